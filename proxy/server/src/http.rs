//! The operator's HTTP side: /metrics, /livez, /readyz and a status page. Read-only; it never touches the query path.
//!
//! Invariant: ready means that statements can be served: the map is known, every primary has answered once, clients can
//! connect, and the process is not draining. Losing Redis, a replica or the hub does not take a proxy out of service.
//! Non-goals: authentication (listen on an internal address) and anything that changes state.

use std::fmt::Write;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use weir_core::admin::{AdminSource, Show, columns};
use weir_core::admin::{Cell, Table};

/// One condition of readiness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// What it is about, e.g. `topology shop` or `primary shop/shard0`.
    pub name: String,
    pub ok: bool,
    /// False: shown, but losing it leaves the proxy ready (Redis, a replica, the hub).
    pub required: bool,
    /// Why not, or what is known.
    pub reason: String,
}

/// What the routes ask of the process.
pub trait Operator: Send + Sync + 'static {
    /// The text of /metrics.
    fn metrics(&self) -> String;

    /// All conditions, in the order to be shown.
    fn readiness(&self) -> Vec<Condition>;

    /// Figures for the status page.
    fn admin(&self) -> &dyn AdminSource;
}

#[derive(Serialize)]
struct Readiness {
    ready: bool,
    conditions: Vec<Condition>,
}

/// All routes.
pub fn router(operator: Arc<dyn Operator>) -> Router {
    Router::new()
        .route("/", get(status))
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(operator)
}

/// Serves until `stop` ends; requests under way are answered first.
pub async fn serve(
    listener: tokio::net::TcpListener,
    operator: Arc<dyn Operator>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, router(operator)).with_graceful_shutdown(stop).await
}

async fn metrics(State(operator): State<Arc<dyn Operator>>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, operator.metrics()).into_response()
}

async fn readyz(State(operator): State<Arc<dyn Operator>>) -> Response {
    let readiness = readiness(operator.readiness());
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, axum::Json(readiness)).into_response()
}

/// No condition at all is not ready: nothing has been set up yet.
fn readiness(conditions: Vec<Condition>) -> Readiness {
    let ready = !conditions.is_empty() && conditions.iter().all(|condition| condition.ok || !condition.required);
    Readiness { ready, conditions }
}

async fn status(State(operator): State<Arc<dyn Operator>>) -> Html<String> {
    let readiness = readiness(operator.readiness());
    let mut page = String::from(HEAD);
    let (class, word) = if readiness.ready { ("good", "ready") } else { ("bad", "not ready") };
    // Writing to a String cannot fail, hence the ignored results.
    let _ =
        write!(page, "<h1>weir <small class={class}>{word}</small></h1><table><tr><th>condition<th>state<th>reason");
    for condition in &readiness.conditions {
        let (class, word) = match (condition.ok, condition.required) {
            (true, _) => ("good", "ok"),
            (false, true) => ("bad", "missing"),
            (false, false) => ("fair", "degraded"),
        };
        let _ = write!(
            page,
            "<tr><td>{}<td class={class}>{word}<td>{}",
            escape(&condition.name),
            escape(&condition.reason)
        );
    }
    page.push_str("</table>");
    for show in [Show::Shards, Show::Replicas, Show::Pools, Show::Stats, Show::Cache, Show::Pins] {
        let _ = write!(page, "<h2>{}</h2>", escape(show.meaning()));
        put_table(&mut page, &columns::show(show, &operator.admin().snapshot(show)));
    }
    page.push_str("<p>The same as text: <a href=/metrics>/metrics</a>, <a href=/readyz>/readyz</a>, and <code>SHOW HELP</code> in the admin database.</p>");
    Html(page)
}

fn put_table(page: &mut String, table: &Table) {
    page.push_str("<table><tr>");
    for column in &table.columns {
        let _ = write!(page, "<th>{}", column.name);
    }
    for row in &table.rows {
        page.push_str("<tr>");
        for cell in row {
            let _ = match cell {
                Cell::Null => write!(page, "<td>"),
                Cell::Text(text) => write!(page, "<td>{}", escape(text)),
                Cell::Int(number) => write!(page, "<td class=number>{number}"),
            };
        }
    }
    page.push_str("</table>");
}

/// Names and errors may hold anything.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const HEAD: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
<title>weir</title><style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c2733}\
table{border-collapse:collapse;display:block;overflow-x:auto;margin:.5rem 0 1.5rem}th,td{padding:.25rem .7rem;text-align:left;\
border-bottom:1px solid #dde3e9;white-space:nowrap}th{font-weight:600;color:#5b6b7b}.number{text-align:right;\
font-variant-numeric:tabular-nums}.good{color:#1a7f47}.fair{color:#a05a00}.bad{color:#b3261e}h2{font-size:1rem;margin:0}</style>";

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use weir_core::admin::Snapshot;
    use weir_core::error::UserError;

    struct Fake(Vec<Condition>);

    impl AdminSource for Fake {
        fn snapshot(&self, _: Show) -> Snapshot {
            Snapshot { cache: vec![("<hits>".to_owned(), 3)], ..Snapshot::default() }
        }

        fn route(&self, _: Option<&str>, _: &str) -> Result<Vec<(String, String)>, UserError> {
            Ok(Vec::new())
        }
    }

    impl Operator for Fake {
        fn metrics(&self) -> String {
            "weir_build_info 1\n".to_owned()
        }

        fn readiness(&self) -> Vec<Condition> {
            self.0.clone()
        }

        fn admin(&self) -> &dyn AdminSource {
            self
        }
    }

    fn condition(name: &str, ok: bool, required: bool) -> Condition {
        Condition { name: name.to_owned(), ok, required, reason: "a <b> reason".to_owned() }
    }

    /// Status line and body of one request over a real socket.
    async fn fetch(conditions: Vec<Condition>, path: &str) -> (String, String) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let server = tokio::spawn(serve(listener, Arc::new(Fake(conditions)), std::future::pending()));
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nhost: weir\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("a reply");
        server.abort();
        let (head, body) = reply.split_once("\r\n\r\n").expect("a head");
        (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
    }

    #[tokio::test]
    async fn ready_when_all_that_is_required_is_there() {
        let (status, body) =
            fetch(vec![condition("topology", true, true), condition("redis", false, false)], "/readyz").await;
        assert!(status.contains(" 200 "), "{status}");
        let body: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!((&body["ready"], &body["conditions"][1]["name"]), (&true.into(), &"redis".into()));
        let (status, body) = fetch(vec![condition("primary shop/shard0", false, true)], "/readyz").await;
        assert!(status.contains(" 503 ") && body.contains("primary shop/shard0"), "{status} {body}");
        assert!(fetch(Vec::new(), "/readyz").await.0.contains(" 503 "));
    }

    #[tokio::test]
    async fn the_other_routes_answer() {
        assert!(fetch(Vec::new(), "/livez").await.0.contains(" 200 "));
        assert_eq!(fetch(Vec::new(), "/metrics").await.1, "weir_build_info 1\n");
        let (status, page) = fetch(vec![condition("redis", false, false)], "/").await;
        assert!(status.contains(" 200 ") && page.contains("degraded") && page.contains("&lt;hits&gt;"), "{page}");
        assert!(!page.contains("<b>"), "names are escaped");
        assert!(fetch(Vec::new(), "/else").await.0.contains(" 404 "));
    }
}
