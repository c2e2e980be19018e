//! Whether this instance can serve: it runs, and its database answers.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::Shared;
use crate::store::sql;

/// 200 if the database answers, else 503.
pub async fn show(State(shop): State<Shared>) -> (StatusCode, Json<Value>) {
    match shop.db.read(sql::PING, &[]).await {
        Ok(_) => (StatusCode::OK, Json(json!({ "status": "ok", "database": "ok" }))),
        Err(error) => {
            tracing::warn!(%error, "the health check failed");
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "unavailable", "database": "unreachable" })))
        }
    }
}
