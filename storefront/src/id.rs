//! Ids, made by the application so that no statement needs a server-side sequence.
//!
//! Invariant: an order's public reference carries its user id, because that is the key its rows are found by; it never
//! carries where the rows live, so it stays valid when they move. Non-goal: secrecy of the ids inside a reference. The
//! signature only keeps references from being made up.

use std::fmt;

use rand::Rng;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::keys::Keys;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id! {
    /// A customer or guest: random, positive, 63 bits.
    UserId(i64)
}
number_id! {
    /// A product of the catalogue.
    ProductId(i64)
}
number_id! {
    /// A category, derived from its slug.
    CategoryId(i32)
}
number_id! {
    /// An order: UUIDv7, so that ids of one user sort by time.
    OrderId(Uuid)
}

impl UserId {
    /// A fresh id. Two customers drawing the same one is as likely as guessing one.
    pub fn random() -> Self {
        Self(rand::rng().random_range(1..i64::MAX))
    }
}

impl OrderId {
    /// A fresh id stamped with the current time.
    pub fn now() -> Self {
        Self(Uuid::now_v7())
    }
}

/// What customers, the payment provider and support see of an order: base32 of user id, order id and a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderRef {
    /// Whose order it is; the key of all its rows.
    pub user: UserId,
    /// Which of that user's orders.
    pub order: OrderId,
}

const IDS: usize = 8 + 16;
const SIGNATURE: usize = 6;

impl OrderRef {
    /// 48 characters of `a-z2-7`.
    pub fn encode(&self, keys: &Keys) -> String {
        let mut bytes = [0; IDS + SIGNATURE];
        bytes[..8].copy_from_slice(&self.user.0.to_be_bytes());
        bytes[8..IDS].copy_from_slice(self.order.0.as_bytes());
        let signature = keys.sign_order(&bytes[..IDS]);
        bytes[IDS..].copy_from_slice(&signature[..SIGNATURE]);
        base32(&bytes)
    }

    /// The order a reference names, or `None` if this shop did not issue it.
    pub fn decode(text: &str, keys: &Keys) -> Option<Self> {
        let bytes = unbase32(text)?;
        let ids = bytes.get(..IDS)?;
        if bytes.len() != IDS + SIGNATURE || !keys.order_signature_fits(ids, &bytes[IDS..]) {
            return None;
        }
        let user = UserId(i64::from_be_bytes(ids[..8].try_into().ok()?));
        Some(Self { user, order: OrderId(Uuid::from_slice(&ids[8..]).ok()?) })
    }
}

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// RFC 4648 base32 in lower case, for whole groups of five bytes.
fn base32(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(5) * 8);
    for group in bytes.chunks(5) {
        let word = group.iter().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
        for index in (0..8).rev() {
            out.push(ALPHABET[(word >> (5 * index) & 31) as usize] as char);
        }
    }
    out
}

fn unbase32(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(8) {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() / 8 * 5);
    for group in text.as_bytes().chunks(8) {
        let word = group.iter().try_fold(0_u64, |word, letter| {
            let lower = letter.to_ascii_lowercase();
            ALPHABET.iter().position(|known| *known == lower).map(|value| word << 5 | value as u64)
        })?;
        out.extend_from_slice(&word.to_be_bytes()[3..]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_its_order_and_no_other() {
        let keys = Keys::from_secret("a secret for this test only");
        let order = OrderRef { user: UserId::random(), order: OrderId::now() };
        let text = order.encode(&keys);
        assert_eq!(text.len(), 48);
        assert_eq!(OrderRef::decode(&text, &keys), Some(order));
        assert_eq!(OrderRef::decode(&text.to_uppercase(), &keys), Some(order));
    }

    #[test]
    fn every_changed_letter_is_refused() {
        let keys = Keys::from_secret("a secret for this test only");
        let text = OrderRef { user: UserId(7), order: OrderId::now() }.encode(&keys);
        for index in 0..text.len() {
            let mut letters = text.clone().into_bytes();
            letters[index] = if letters[index] == b'a' { b'b' } else { b'a' };
            let forged = String::from_utf8(letters).expect("ASCII");
            assert_eq!(OrderRef::decode(&forged, &keys), None, "letter {index}");
        }
    }

    #[test]
    fn another_shop_and_garbage_are_refused() {
        let keys = Keys::from_secret("one");
        let text = OrderRef { user: UserId(7), order: OrderId::now() }.encode(&Keys::from_secret("two"));
        for bad in [text.as_str(), "", "a", "aaaaaaaa", "0000000011111111", &"é".repeat(24)] {
            assert_eq!(OrderRef::decode(bad, &keys), None, "{bad:?}");
        }
    }

    #[test]
    fn user_ids_are_positive() {
        assert!((0..1000).all(|_| UserId::random().0 > 0));
    }
}
