//! The rows of one INSERT for several shards: who gets which, and the order of what comes back.
//!
//! Each shard is sent the original text without the rows that are not its own, so that a row is evaluated once, by its owner. Postgres
//! returns RETURNING rows in the order of VALUES, so those of a shard are in order among themselves; where some may be
//! missing (ON CONFLICT, triggers) each returned row carries its key, and the order is given only if it is certain.
//! Non-goals: sending anything, and what the values mean.

use std::sync::Arc;

use crate::error::UserError;
use crate::id::ShardId;
use crate::sql::rows::Rows;
use crate::sql::word::quote_name;
use crate::topology::KeyType;

use super::refuse;
use super::values::text_key;

/// What a template knows of its rows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Deal {
    pub rows: Rows,
    /// Which demand holds one key per row.
    pub demand: usize,
    pub key: Box<str>,
    pub key_type: KeyType,
    /// A shard may return fewer rows than it was sent.
    pub may_skip: bool,
}

impl Deal {
    /// What is added behind RETURNING so that rows can be told apart; empty: nothing.
    pub fn tracked(&self) -> String {
        if self.rows.returning && self.may_skip {
            format!(", ({})::text", quote_name(&self.key))
        } else {
            String::new()
        }
    }

    /// The hash of a returned key, as [`Deal::tracked`] asks for it.
    pub fn key_hash(&self, text: &[u8]) -> Result<u64, UserError> {
        Ok(text_key(text.into(), self.key_type)?.hash())
    }
}

/// A [`Deal`] with the values of one execution.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dealt {
    pub deal: Arc<Deal>,
    /// The owner of each row.
    pub owners: Box<[ShardId]>,
    /// The hash of each row's key.
    pub hashes: Box<[u64]>,
}

/// What one shard has returned, in its own order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Returned {
    pub shard: ShardId,
    /// Returned rows.
    pub rows: usize,
    /// Their keys' hashes, where rows may be missing.
    pub hashes: Vec<u64>,
}

impl Dealt {
    /// From which shard (an index into `returned`) each row of the answer comes; 0A000 if the order is not certain.
    ///
    /// Every returned row stands for one that was sent, between an earliest and a latest place. If no row of another shard
    /// was sent between the two, all possible places mean the same order.
    pub fn order(&self, returned: &[Returned]) -> Result<Vec<usize>, UserError> {
        let mut placed = Vec::with_capacity(returned.iter().map(|part| part.rows).sum());
        for (index, part) in returned.iter().enumerate() {
            let sent: Vec<usize> = (0..self.owners.len()).filter(|row| self.owners[*row] == part.shard).collect();
            if part.rows == sent.len() {
                placed.extend(sent.into_iter().map(|row| (row, index)));
                continue;
            }
            let uncertain = refuse::returning_order;
            if part.hashes.len() != part.rows {
                return Err(uncertain());
            }
            let earliest = self.matched(sent.iter().copied(), part.hashes.iter()).ok_or_else(uncertain)?;
            let mut latest =
                self.matched(sent.iter().rev().copied(), part.hashes.iter().rev()).ok_or_else(uncertain)?;
            latest.reverse();
            for (first, last) in earliest.into_iter().zip(latest) {
                if self.owners[first..=last].iter().any(|owner| *owner != part.shard) {
                    return Err(uncertain());
                }
                placed.push((first, index));
            }
        }
        placed.sort_unstable();
        Ok(placed.into_iter().map(|(_, index)| index).collect())
    }

    /// The first place for each hash in turn; `None` if one has none.
    fn matched<'h>(
        &self,
        mut sent: impl Iterator<Item = usize>,
        hashes: impl Iterator<Item = &'h u64>,
    ) -> Option<Vec<usize>> {
        hashes.map(|hash| sent.find(|row| self.hashes[*row] == *hash)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sql::lex::lex;

    /// Rows by key; a key's shard is the key modulo 3.
    fn dealt(keys: &[u64]) -> Dealt {
        let rows: Vec<String> = keys.iter().map(|key| format!("({key})")).collect();
        let sql = format!("INSERT INTO t (k) VALUES {} RETURNING k", rows.join(","));
        let mut tokens = Vec::new();
        lex(&sql, &mut tokens).expect("lexes");
        let rows = Rows::find(&sql, &tokens).expect("rows");
        let deal = Deal { rows, demand: 0, key: "k".into(), key_type: KeyType::Int, may_skip: true };
        let owners = keys.iter().map(|key| ShardId((key % 3) as u16)).collect();
        Dealt { deal: Arc::new(deal), owners, hashes: keys.into() }
    }

    proptest! {
        /// Whatever rows are skipped: the order is the true one, or it is refused.
        #[test]
        fn rows_come_back_in_order_or_not_at_all(rows in prop::collection::vec((0..9_u64, any::<bool>()), 1..14)) {
            let keys: Vec<u64> = rows.iter().map(|row| row.0).collect();
            let dealt = dealt(&keys);
            let returned: Vec<Returned> = (0..3_u16).map(|shard| {
                let mine = rows.iter().filter(|(key, kept)| key % 3 == u64::from(shard) && *kept);
                let hashes: Vec<u64> = mine.map(|row| row.0).collect();
                Returned { shard: ShardId(shard), rows: hashes.len(), hashes }
            }).collect();
            if let Ok(order) = dealt.order(&returned) {
                let mut taken = [0; 3];
                let got: Vec<u64> = order.iter().map(|&from| {
                    taken[from] += 1;
                    returned[from].hashes[taken[from] - 1]
                }).collect();
                let truth: Vec<u64> = rows.iter().filter(|row| row.1).map(|row| row.0).collect();
                prop_assert_eq!(got, truth);
            } else {
                // Only rows of equal keys can be mistaken for each other.
                let mut unique = keys.clone();
                unique.sort_unstable();
                unique.dedup();
                prop_assert!(unique.len() < keys.len());
            }
        }
    }

    #[test]
    fn complete_answers_need_no_keys_and_incomplete_ones_do() {
        let dealt = dealt(&[0, 1, 3, 1, 4]);
        let part = |shard, rows, hashes: &[u64]| Returned { shard: ShardId(shard), rows, hashes: hashes.to_vec() };
        assert_eq!(dealt.order(&[part(0, 2, &[]), part(1, 3, &[])]), Ok(vec![0, 1, 0, 1, 1]));
        assert!(dealt.order(&[part(0, 1, &[]), part(1, 3, &[])]).is_err());
        assert_eq!(dealt.order(&[part(0, 1, &[3]), part(1, 3, &[])]), Ok(vec![1, 0, 1, 1]));
        // One of two rows of key 1, with a row of another shard between them.
        assert!(dealt.order(&[part(0, 2, &[]), part(1, 2, &[1, 4])]).is_err());
        assert!(dealt.order(&[part(0, 1, &[6]), part(1, 3, &[])]).is_err());
    }
}
