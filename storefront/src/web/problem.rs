//! What went wrong, as the client learns it: a page or JSON, from one place.
//!
//! Invariant: nothing of the database's own words reaches a client; they go to the log.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::negotiate::Wants;
use crate::pay::PayError;
use crate::store::StoreError;

/// A refusal or failure.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The HTTP status.
    pub status: StatusCode,
    /// A stable word for programs.
    pub code: &'static str,
    /// One sentence for people.
    pub message: String,
    /// Where a browser should go instead of reading this.
    pub go_to: Option<String>,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, message: &str) -> Self {
        Self { status, code, message: message.to_owned(), go_to: None }
    }

    /// There is no such thing.
    pub fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", &format!("There is no such {what}."))
    }

    /// The request cannot be understood.
    pub fn bad_request(why: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", why)
    }

    /// A field has an impossible value.
    pub fn invalid(why: &str) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", why)
    }

    /// Only for customers who are logged in; a browser goes to log in and comes back to `next`.
    pub fn log_in(next: &str) -> Self {
        let mut problem = Self::new(StatusCode::UNAUTHORIZED, "log_in", "Please log in first.");
        problem.go_to = Some(format!("/login?next={next}"));
        problem
    }

    /// Not for this visitor.
    pub fn forbidden(why: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", why)
    }

    /// The request contradicts the present state.
    pub fn conflict(code: &'static str, why: &str) -> Self {
        Self::new(StatusCode::CONFLICT, code, why)
    }

    /// Come back in a moment.
    pub fn unavailable() -> Self {
        let message = "The shop cannot reach its database right now. Nothing was lost; please try again in a moment.";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
    }

    /// Too many at once.
    pub fn busy() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "busy", "The shop is very busy. Please try again in a moment.")
    }

    /// A fault of the shop.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "Something went wrong on our side.")
    }

    /// The answer in the form the client wants; `page` makes the HTML.
    pub fn render(&self, wants: Wants, page: impl FnOnce(&Self) -> Response) -> Response {
        let mut response = match (wants, &self.go_to) {
            (Wants::Json, _) => {
                let body = json!({ "error": { "code": self.code, "message": self.message } });
                (self.status, axum::Json(body)).into_response()
            }
            (Wants::Html, Some(target)) => axum::response::Redirect::to(target).into_response(),
            (Wants::Html, None) => {
                let mut response = page(self);
                *response.status_mut() = self.status;
                response
            }
        };
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            let name: HeaderName = header::RETRY_AFTER;
            response.headers_mut().insert(name, HeaderValue::from_static("2"));
        }
        response
    }
}

/// Carries the problem to the middleware that knows what the client wants.
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Unavailable(_) => {
                tracing::warn!(%error, "a request met an unavailable database");
                Self::unavailable()
            }
            StoreError::Refused(cause) | StoreError::Shape(cause) => {
                let cause = cause.as_db_error().map(ToString::to_string);
                tracing::error!(%error, cause, "a request failed in the database");
                Self::internal()
            }
        }
    }
}

impl From<PayError> for Problem {
    fn from(error: PayError) -> Self {
        tracing::warn!(%error, "a request met the payment provider");
        let message = "The payment service does not answer right now. Your order is kept; please try to pay again.";
        Self::new(StatusCode::BAD_GATEWAY, "payment_unavailable", message)
    }
}
