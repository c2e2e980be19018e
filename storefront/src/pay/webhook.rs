//! Webhooks: signed messages from the payment provider.
//!
//! Invariant: a message is believed only if its signature fits its exact bytes and its timestamp is within `TOLERANCE`;
//! replays inside that time are found by the event id (table `webhook_events`). Non-goal: order of delivery.
//!
//! Header as Stripe's: `t=<unix seconds>,v1=<hex HMAC-SHA256 of "<t>.<body>">`, with possibly several `v1`.

use serde::{Deserialize, Serialize};

use super::Session;
use crate::keys::{hex, hmac_fits, hmac_sha256, unhex};

/// The header that carries the signature.
pub const HEADER: &str = "payment-signature";

/// How far a message's time may be from ours, in seconds.
pub const TOLERANCE: i64 = 300;

/// A message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// The provider's id of it, `evt_…`; the same in every delivery.
    pub id: String,
    /// What happened.
    #[serde(rename = "type")]
    pub kind: String,
    /// When, in unix seconds.
    pub created: i64,
    /// To what.
    pub data: EventData,
}

/// The object of a message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventData {
    /// The payment session.
    pub object: Session,
    /// Why a payment failed: `card_declined`, `insufficient_funds`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// The customer paid.
pub const COMPLETED: &str = "checkout.session.completed";
/// The customer's card was declined.
pub const FAILED: &str = "payment_intent.payment_failed";

/// Why a message is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// No header, or not of its form.
    #[error("the signature header is missing or malformed")]
    Malformed,
    /// Too old, or from the future.
    #[error("the signature's time is outside the tolerance")]
    Stale,
    /// Not signed with our key, or altered.
    #[error("the signature does not fit")]
    Forged,
    /// Signed, but not a message we understand.
    #[error("the body is not an event")]
    NotAnEvent,
}

/// The header for `body` at `now`.
pub fn sign(key: &[u8], body: &[u8], now: i64) -> String {
    let time = now.to_string();
    format!("t={time},v1={}", hex(&hmac_sha256(key, &[time.as_bytes(), b".", body])))
}

/// The message in `body`, if `header` proves it.
pub fn verify(key: &[u8], header: Option<&str>, body: &[u8], now: i64) -> Result<Event, Reject> {
    let header = header.ok_or(Reject::Malformed)?;
    let mut time = None;
    let mut signatures: Vec<Vec<u8>> = Vec::new();
    for (name, value) in header.split(',').filter_map(|part| part.trim().split_once('=')) {
        match name {
            "t" => time = Some(value),
            "v1" if signatures.len() < 8 => signatures.extend(unhex(value)),
            _ => {}
        }
    }
    let time = time.ok_or(Reject::Malformed)?;
    let seconds: i64 = time.parse().map_err(|_| Reject::Malformed)?;
    if signatures.is_empty() {
        return Err(Reject::Malformed);
    }
    if !signatures.iter().any(|signature| hmac_fits(key, &[time.as_bytes(), b".", body], signature)) {
        return Err(Reject::Forged);
    }
    if now.abs_diff(seconds) > TOLERANCE.unsigned_abs() {
        return Err(Reject::Stale);
    }
    serde_json::from_slice(body).map_err(|_| Reject::NotAnEvent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"whsec_test";
    const BODY: &[u8] = br#"{"id":"evt_1","type":"checkout.session.completed","created":1000,"data":{"object":{
        "id":"cs_1","url":"http://p/pay/cs_1","client_reference_id":"r","amount_total":500,"currency":"usd",
        "payment_status":"paid"}}}"#;

    #[test]
    fn a_signed_message_is_believed_within_the_tolerance() {
        let header = sign(KEY, BODY, 1000);
        for now in [1000, 1000 + TOLERANCE, 1000 - TOLERANCE] {
            assert_eq!(verify(KEY, Some(&header), BODY, now).expect("believed").id, "evt_1");
        }
        for now in [1001 + TOLERANCE, 999 - TOLERANCE, i64::MIN, i64::MAX] {
            assert_eq!(verify(KEY, Some(&header), BODY, now).err(), Some(Reject::Stale));
        }
    }

    #[test]
    fn a_known_signature_as_any_tool_computes_it() {
        // printf '1700000000.{}' | openssl dgst -sha256 -hmac whsec_test
        let header = sign(KEY, b"{}", 1_700_000_000);
        assert_eq!(header, "t=1700000000,v1=35495024f4ef3f94e5a93e22221544c4b75e9a42300cd965ab81cb85cd994e91");
        assert_eq!(verify(KEY, Some(&header), b"{}", 1_700_000_000).err(), Some(Reject::NotAnEvent));
    }

    #[test]
    fn one_of_several_signatures_is_enough() {
        let good = sign(KEY, BODY, 1000);
        let (time, good) = good.split_once(',').expect("two parts");
        let other = hex(&[7; 32]);
        assert!(verify(KEY, Some(&format!("{time},v1={other},{good}")), BODY, 1000).is_ok());
        assert!(verify(KEY, Some(&format!("{time},{good},v0=x,v1={other}")), BODY, 1000).is_ok());
    }

    #[test]
    fn what_was_altered_or_is_malformed_is_refused() {
        let header = sign(KEY, BODY, 1000);
        let mut altered = BODY.to_vec();
        altered[7] ^= 1;
        assert_eq!(verify(KEY, Some(&header), &altered, 1000).err(), Some(Reject::Forged));
        assert_eq!(verify(b"other", Some(&header), BODY, 1000).err(), Some(Reject::Forged));
        assert_eq!(verify(KEY, Some(&header.replace("t=1000", "t=1001")), BODY, 1000).err(), Some(Reject::Forged));
        let (_, signature) = header.split_once(",v1=").expect("two parts");
        let truncated = format!("t=1000,v1={}", &signature[..62]);
        assert_eq!(verify(KEY, Some(&truncated), BODY, 1000).err(), Some(Reject::Forged));
        for bad in ["", "t=1000", "v1=00", "t=x,v1=00", "t=1000,v1=zz", "t=1000;v1=00"] {
            assert_eq!(verify(KEY, Some(bad), BODY, 1000).err(), Some(Reject::Malformed), "{bad:?}");
        }
        assert_eq!(verify(KEY, None, BODY, 1000).err(), Some(Reject::Malformed));
    }
}
