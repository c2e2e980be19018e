//! A payment provider reached over HTTP: the sandbox, or anything that answers the same three calls.
//!
//! Invariant: every call ends within `CALL_MAX`. Non-goal: retries; each call is repeated by whoever needs it (the customer
//! on the order page, or the outbox).

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::{NewSession, PayError, PaymentProvider, Session};

const CALL_MAX: Duration = Duration::from_secs(10);

/// The client of a provider's API.
pub struct HttpProvider {
    client: reqwest::Client,
    base: String,
    key: String,
}

impl HttpProvider {
    /// `base` is the provider's address without a slash at its end, `key` the bearer token.
    pub fn new(base: &str, key: &str) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder().timeout(CALL_MAX).no_proxy().build()?;
        Ok(Self { client, base: base.trim_end_matches('/').to_owned(), key: key.to_owned() })
    }

    async fn call<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T, PayError> {
        let unavailable = |error: reqwest::Error| PayError::Unavailable(error.without_url().to_string());
        let answer = request.bearer_auth(&self.key).send().await.map_err(unavailable)?;
        let status = answer.status();
        if status.is_success() {
            return answer.json().await.map_err(unavailable);
        }
        let refused = format!("HTTP {status}");
        Err(if status.is_server_error() { PayError::Unavailable(refused) } else { PayError::Refused(refused) })
    }
}

/// A path segment without surprises: the provider's ids are letters, digits and underscores.
fn checked(id: &str) -> Result<&str, PayError> {
    let plain = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if plain { Ok(id) } else { Err(PayError::Refused("not a session id".into())) }
}

impl PaymentProvider for HttpProvider {
    fn open(&self, new: NewSession) -> BoxFuture<'_, Result<Session, PayError>> {
        let request = self.client.post(format!("{}/v1/checkout/sessions", self.base)).json(&new);
        self.call(request).boxed()
    }

    fn get<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Session, PayError>> {
        async move {
            let id = checked(id)?;
            self.call(self.client.get(format!("{}/v1/checkout/sessions/{id}", self.base))).await
        }
        .boxed()
    }

    fn refund<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<(), PayError>> {
        async move {
            let body = json!({ "session": checked(id)? });
            let request = self.client.post(format!("{}/v1/refunds", self.base)).json(&body);
            self.call::<serde_json::Value>(request).await.map(drop)
        }
        .boxed()
    }
}
