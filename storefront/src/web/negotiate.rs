//! One handler for browsers and programs: what the client wants back, and what it sent.
//!
//! Invariant: JSON is answered only to a client that asks for it and does not also accept HTML. Non-goal: quality values.

use std::convert::Infallible;

use axum::Json;
use axum::extract::{Form, FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use serde::de::DeserializeOwned;

use super::problem::Problem;

/// The form of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// A page.
    Html,
    /// Data.
    Json,
}

impl Wants {
    /// As the Accept header says.
    pub fn of(headers: &HeaderMap) -> Self {
        let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if accept.contains("application/json") && !accept.contains("text/html") { Self::Json } else { Self::Html }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Wants {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::of(&parts.headers))
    }
}

/// A request body, sent as JSON or as a form.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if kind.is_some_and(|kind| kind.starts_with("application/json")) {
            let Json(body) =
                Json::from_request(request, state).await.map_err(|error| Problem::bad_request(&error.body_text()))?;
            return Ok(Self(body));
        }
        let Form(body) =
            Form::from_request(request, state).await.map_err(|error| Problem::bad_request(&error.body_text()))?;
        Ok(Self(body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn browsers_get_pages_and_programs_get_data() {
        let wants = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().expect("a header"));
            Wants::of(&headers)
        };
        assert_eq!(wants("application/json"), Wants::Json);
        assert_eq!(wants("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"), Wants::Html);
        assert_eq!(wants("text/html, application/json"), Wants::Html);
        assert_eq!(wants("*/*"), Wants::Html);
        assert_eq!(Wants::of(&HeaderMap::new()), Wants::Html);
    }
}
