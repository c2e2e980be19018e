//! Users, their sessions, and who has which e-mail address.
//!
//! Invariant: an address is claimed (rows of the address) before the account is written (rows of the user); a crash between
//! the two leaves a claim without an account, which the next registration removes once it is old. A guest is a user without
//! an address, so registering moves nothing.

use time::{Duration, OffsetDateTime};
use tokio_postgres::Row;

use super::{Db, StoreError, sql};
use crate::id::UserId;

const SESSION_DAYS: i64 = 7;
const CLAIM_GRACE: Duration = Duration::minutes(10);

/// A user's account as its row has it.
#[derive(Clone, Debug)]
pub struct Account {
    /// None: a guest.
    pub email: Option<String>,
    /// What the user wants to be called.
    pub name: Option<String>,
    /// The password's hash in PHC format.
    pub pw_hash: Option<String>,
}

/// Who asks, as the session tells.
#[derive(Clone, Debug)]
pub struct Known {
    /// Their address; none: a guest.
    pub email: Option<String>,
    /// Their name.
    pub name: Option<String>,
}

/// Creates a guest.
pub async fn create_guest(db: &Db, user: UserId) -> Result<(), StoreError> {
    db.change(sql::USER_INSERT_GUEST, &[&user.0]).await.map(drop)
}

/// Claims `email` for `user`. False: it is someone else's.
pub async fn claim_email(db: &Db, email: &str, user: UserId) -> Result<bool, StoreError> {
    for _ in 0..2 {
        if !db.write(sql::EMAIL_CLAIM, &[&email, &user.0]).await?.is_empty() {
            return Ok(true);
        }
        let Some((owner, since)) = email_owner(db, email).await? else {
            continue; // The claim was removed meanwhile.
        };
        if owner == user {
            return Ok(true);
        }
        let finished = account(db, owner).await?.is_some_and(|account| account.email.as_deref() == Some(email));
        if finished || OffsetDateTime::now_utc() - since < CLAIM_GRACE {
            return Ok(false);
        }
        db.change(sql::EMAIL_UNCLAIM, &[&email, &owner.0, &since]).await?;
    }
    Ok(false)
}

/// Who has an address.
pub async fn email_owner(db: &Db, email: &str) -> Result<Option<(UserId, OffsetDateTime)>, StoreError> {
    let row = db.read_opt(sql::EMAIL_OWNER, &[&email]).await?;
    row.map(|row| Ok((UserId(row.try_get(0)?), row.try_get(1)?))).transpose().map_err(StoreError::Shape)
}

/// Writes an account whose address has been claimed; the guest of that id, if there is one, becomes it.
pub async fn save(db: &Db, user: UserId, email: &str, name: &str, pw_hash: &str) -> Result<(), StoreError> {
    db.change(sql::USER_UPSERT, &[&user.0, &email, &name, &pw_hash]).await.map(drop)
}

/// One account.
pub async fn account(db: &Db, user: UserId) -> Result<Option<Account>, StoreError> {
    let row = db.read_opt(sql::USER, &[&user.0]).await?;
    let get = |row: Row| Ok(Account { email: row.try_get(0)?, name: row.try_get(1)?, pw_hash: row.try_get(2)? });
    row.map(get).transpose().map_err(StoreError::Shape)
}

/// Changes what a user is called.
pub async fn rename(db: &Db, user: UserId, name: &str) -> Result<(), StoreError> {
    db.change(sql::USER_RENAME, &[&user.0, &name]).await.map(drop)
}

/// Starts a session that lasts seven days.
pub async fn start_session(db: &Db, user: UserId, token_hash: &[u8]) -> Result<(), StoreError> {
    let expires = OffsetDateTime::now_utc() + Duration::days(SESSION_DAYS);
    db.change(sql::SESSION_INSERT, &[&user.0, &token_hash, &expires]).await.map(drop)
}

/// Who a session belongs to, if it has not expired.
pub async fn visitor(db: &Db, user: UserId, token_hash: &[u8]) -> Result<Option<Known>, StoreError> {
    let Some(row) = db.read_opt(sql::SESSION_VISITOR, &[&user.0, &token_hash]).await? else {
        return Ok(None);
    };
    let get = || Ok((Known { email: row.try_get(0)?, name: row.try_get(1)? }, row.try_get(2)?));
    let (known, expires): (Known, OffsetDateTime) = get().map_err(StoreError::Shape)?;
    Ok(Some(known).filter(|_| expires > OffsetDateTime::now_utc()))
}

/// Ends a session.
pub async fn end_session(db: &Db, user: UserId, token_hash: &[u8]) -> Result<(), StoreError> {
    db.change(sql::SESSION_DELETE, &[&user.0, &token_hash]).await.map(drop)
}
