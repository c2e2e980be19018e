//! Registering, logging in and out, and the profile.
//!
//! Invariant: a wrong address and a wrong password are answered alike, in words and in time.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::json;

use super::negotiate::{Body, Wants};
use super::pages::{self, Form, Frame};
use super::problem::Problem;
use super::session::{self, Customer, MaybeVisitor, Visitor};
use super::{Shared, local_path, see_other, with_cookie};
use crate::id::UserId;
use crate::store::{cart, users};

const PASSWORD_MIN: usize = 8;
const PASSWORD_MAX: usize = 200;
const NAME_MAX: usize = 80;

/// Where to go afterwards.
#[derive(Deserialize)]
pub struct Next {
    next: Option<String>,
}

/// What a new customer enters.
#[derive(Deserialize)]
pub struct Registration {
    name: String,
    email: String,
    password: String,
    next: Option<String>,
}

/// What a returning customer enters.
#[derive(Deserialize)]
pub struct Login {
    email: String,
    password: String,
    next: Option<String>,
}

/// A new name.
#[derive(Deserialize)]
pub struct Rename {
    name: String,
}

fn email(text: &str) -> Result<String, Problem> {
    let email = text.trim().to_lowercase();
    let shaped = email
        .split_once('@')
        .is_some_and(|(local, host)| !local.is_empty() && host.contains('.') && !host.contains('@'));
    if shaped && email.len() <= 254 && !email.chars().any(|c| c.is_whitespace() || c.is_control()) {
        Ok(email)
    } else {
        Err(Problem::invalid("Please enter a valid e-mail address."))
    }
}

pub(super) fn line(text: &str, what: &str, most: usize) -> Result<String, Problem> {
    let text = text.trim();
    if text.is_empty() || text.chars().count() > most || text.chars().any(|c| c.is_control() && c != '\n' && c != '\r')
    {
        return Err(Problem::invalid(&format!("Please enter {what} of at most {most} characters.")));
    }
    Ok(text.to_owned())
}

fn password(text: String) -> Result<String, Problem> {
    if (PASSWORD_MIN..=PASSWORD_MAX).contains(&text.len()) {
        Ok(text)
    } else {
        Err(Problem::invalid(&format!("A password has between {PASSWORD_MIN} and {PASSWORD_MAX} characters.")))
    }
}

/// The empty form.
pub async fn register_form(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    Query(next): Query<Next>,
) -> Result<Response, Problem> {
    let frame = Frame::load(&shop, visitor.as_ref(), "Create an account").await?;
    pages::register(frame, &Form::empty(local_path(next.next.as_deref())))
}

/// Creates an account; a guest keeps the cart.
pub async fn register(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
    Body(entered): Body<Registration>,
) -> Result<Response, Problem> {
    let next = local_path(entered.next.as_deref()).to_owned();
    let again = Form { name: entered.name.clone(), email: entered.email.clone(), next: next.clone(), problem: None };
    match try_register(&shop, visitor.as_ref(), entered).await {
        Ok((user, cookie)) => match wants {
            Wants::Html => Ok(see_other(&next, Some(cookie))),
            Wants::Json => {
                let body = (StatusCode::CREATED, Json(json!({ "user_id": user.to_string() }))).into_response();
                Ok(with_cookie(body, Some(cookie)))
            }
        },
        Err(problem) if wants == Wants::Html && problem.status.is_client_error() => {
            let frame = Frame::load(&shop, visitor.as_ref(), "Create an account").await?;
            let status = problem.status;
            let mut page = pages::register(frame, &Form { problem: Some(problem.message), ..again })?;
            *page.status_mut() = status;
            Ok(page)
        }
        Err(problem) => Err(problem),
    }
}

async fn try_register(
    shop: &Shared,
    visitor: Option<&Visitor>,
    entered: Registration,
) -> Result<(UserId, axum::http::HeaderValue), Problem> {
    if visitor.is_some_and(Visitor::is_customer) {
        return Err(Problem::conflict("logged_in", "You are logged in already. Please log out first."));
    }
    let email = email(&entered.email)?;
    let name = line(&entered.name, "a name", NAME_MAX)?;
    let hash = shop.passwords.hash(password(entered.password)?).await?;
    let user = visitor.map_or_else(UserId::random, |guest| guest.user);
    if !users::claim_email(&shop.db, &email, user).await? {
        return Err(Problem::conflict("email_taken", "There is an account with this e-mail address already."));
    }
    users::save(&shop.db, user, &email, &name, &hash).await?;
    let cookie = session::start(shop, user).await?;
    if let Some(guest) = visitor {
        session::end(&shop.db, guest).await?;
    }
    Ok((user, cookie))
}

/// The empty form.
pub async fn login_form(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    Query(next): Query<Next>,
) -> Result<Response, Problem> {
    let frame = Frame::load(&shop, visitor.as_ref(), "Log in").await?;
    pages::login(frame, &Form::empty(local_path(next.next.as_deref())))
}

/// Logs in; a guest's cart moves to the account.
pub async fn login(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
    Body(entered): Body<Login>,
) -> Result<Response, Problem> {
    let next = local_path(entered.next.as_deref()).to_owned();
    let typed = entered.email.clone();
    let address = entered.email.trim().to_lowercase();
    let owner = users::email_owner(&shop.db, &address).await?.map(|(user, _)| user);
    let account = match owner {
        Some(user) => users::account(&shop.db, user).await?.map(|account| (user, account)),
        None => None,
    };
    let account = account.filter(|(_, account)| account.email.as_deref() == Some(address.as_str()));
    let hash = account.as_ref().and_then(|(_, account)| account.pw_hash.clone());
    let fits = shop.passwords.fits(entered.password, hash).await?;
    let Some((user, _)) = account.filter(|_| fits) else {
        let message = "The e-mail address or the password is not right.";
        if wants == Wants::Json {
            let mut problem = Problem::forbidden(message);
            (problem.status, problem.code) = (StatusCode::UNAUTHORIZED, "wrong_login");
            return Err(problem);
        }
        let frame = Frame::load(&shop, visitor.as_ref(), "Log in").await?;
        let form = Form { email: typed, next, problem: Some(message.to_owned()), ..Form::empty("/") };
        let mut page = pages::login(frame, &form)?;
        *page.status_mut() = StatusCode::UNAUTHORIZED;
        return Ok(page);
    };
    let cookie = session::start(&shop, user).await?;
    if let Some(before) = &visitor {
        if !before.is_customer() {
            cart::merge(&shop.db, before.user, user).await?;
        }
        session::end(&shop.db, before).await?;
    }
    match wants {
        Wants::Html => Ok(see_other(&next, Some(cookie))),
        Wants::Json => Ok(with_cookie(Json(json!({ "user_id": user.to_string() })).into_response(), Some(cookie))),
    }
}

/// Ends the session.
pub async fn logout(
    State(shop): State<Shared>,
    MaybeVisitor(visitor): MaybeVisitor,
    wants: Wants,
) -> Result<Response, Problem> {
    if let Some(visitor) = &visitor {
        session::end(&shop.db, visitor).await?;
    }
    let cookie = Some(session::forget(&shop));
    match wants {
        Wants::Html => Ok(see_other("/", cookie)),
        Wants::Json => Ok(with_cookie(Json(json!({ "status": "logged_out" })).into_response(), cookie)),
    }
}

/// The profile.
pub async fn show(State(shop): State<Shared>, Customer(visitor): Customer, wants: Wants) -> Result<Response, Problem> {
    match wants {
        Wants::Json => {
            let body = json!({ "user_id": visitor.user.to_string(), "email": visitor.email, "name": visitor.name });
            Ok(Json(body).into_response())
        }
        Wants::Html => {
            let frame = Frame::load(&shop, Some(&visitor), "Your account").await?;
            pages::account(frame, &visitor)
        }
    }
}

/// Changes the customer's name.
pub async fn rename(
    State(shop): State<Shared>,
    Customer(visitor): Customer,
    wants: Wants,
    Body(entered): Body<Rename>,
) -> Result<Response, Problem> {
    let name = line(&entered.name, "a name", NAME_MAX)?;
    users::rename(&shop.db, visitor.user, &name).await?;
    match wants {
        Wants::Html => Ok(see_other("/account", None)),
        Wants::Json => Ok(Json(json!({ "email": visitor.email, "name": name })).into_response()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_and_folded() {
        assert_eq!(email(" Ann@Example.ORG ").expect("an address"), "ann@example.org");
        for bad in ["", "ann", "@example.org", "ann@", "ann@host", "a b@example.org", "a@b@c.org"] {
            assert!(email(bad).is_err(), "{bad:?}");
        }
    }
}
