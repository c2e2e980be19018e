//! Wiring: configuration in, a running shop out.
//!
//! Invariant: everything that is started here is stopped here: on SIGTERM or Ctrl-C the listeners close, requests under way
//! finish within `DRAIN_MAX`, and the workers end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};

use crate::keys::{Keys, Origin};
use crate::pay::http::HttpProvider;
use crate::pay::{PaymentProvider, sandbox};
use crate::store::{Db, schema};
use crate::web::admin::Admin;
use crate::web::assets::Assets;
use crate::web::session::{PasswordCost, Passwords};
use crate::web::{self, Shop};
use crate::work::Work;

const DRAIN_MAX: Duration = Duration::from_secs(10);

/// What `serve` is told.
#[derive(Clone, Debug)]
pub struct Serve {
    /// Where the shop listens.
    pub listen: SocketAddr,
    /// The database.
    pub database_url: String,
    /// Most connections to it.
    pub connections: u32,
    /// Whether to apply the schema first.
    pub migrate: bool,
    /// Whether to print one JSON line when ready.
    pub ready_json: bool,
    /// The address customers use; none: as the Host header says.
    pub public_url: Option<String>,
    /// Where the sandbox provider listens.
    pub payments_listen: SocketAddr,
    /// The address customers reach the sandbox at; none: where it listens.
    pub payments_public_url: Option<String>,
    /// A provider that runs elsewhere; then no sandbox is started.
    pub payments_url: Option<String>,
    /// How long stock is reserved for an unpaid order.
    pub hold_for: Duration,
    /// How often workers look for work.
    pub work_every: Duration,
    /// What a password hash costs.
    pub password_cost: PasswordCost,
    /// Shows the reports.
    pub admin_token: Option<String>,
}

/// Serves until told to stop.
pub async fn serve(options: Serve, (keys, origin): (Keys, Origin)) -> anyhow::Result<()> {
    if origin == Origin::MadeUp {
        tracing::warn!("no secret was given, so one was made up: order references end with this process");
    }
    let db = Db::new(&options.database_url, options.connections)?;
    if options.migrate {
        schema::migrate(&db).await?;
    }
    let listener =
        TcpListener::bind(options.listen).await.with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = listener.local_addr()?;
    let (stop, stopped) = watch::channel(false);
    let (payments_url, payments_task) = payments(&options, &keys, address, &stopped).await?;
    let public_payments = options.payments_public_url.clone().unwrap_or_else(|| payments_url.clone());
    let provider: Arc<dyn PaymentProvider> = Arc::new(HttpProvider::new(&payments_url, keys.provider())?);
    let bell = Arc::new(Notify::new());
    let work =
        Work { db: db.clone(), provider: Arc::clone(&provider), bell: Arc::clone(&bell), every: options.work_every };
    let worker = tokio::spawn(work.run(stopped.clone()));
    let admin = match options.admin_token.clone() {
        Some(token) => Admin::Token(token),
        None if address.ip().is_loopback() => Admin::Open,
        None => Admin::Closed,
    };
    let shop = Arc::new(Shop {
        db,
        keys,
        provider,
        passwords: Passwords::new(options.password_cost)?,
        assets: Assets::new(),
        hold_for: options.hold_for,
        secure_cookies: options.public_url.as_deref().is_some_and(|url| url.starts_with("https://")),
        public_url: options.public_url.as_deref().map(|url| url.trim_end_matches('/').to_owned()),
        admin,
        payment_origin: public_payments,
        bell,
    });
    let shop_task = tokio::spawn(run(listener, web::router(shop), stopped));
    tracing::info!(%address, payments = payments_url, "the shop is open");
    if options.ready_json {
        println!("{}", json!({ "listening": format!("http://{address}"), "payments": payments_url }));
    }
    stop_signal().await?;
    tracing::info!("closing");
    stop.send_replace(true);
    let all = async {
        shop_task.await.context("the shop's task failed")??;
        if let Some(task) = payments_task {
            task.await.context("the sandbox's task failed")??;
        }
        worker.await.context("the worker's task failed")
    };
    match tokio::time::timeout(DRAIN_MAX, all).await {
        Ok(done) => done,
        Err(_) => {
            tracing::warn!("some requests did not finish in time");
            Ok(())
        }
    }
}

type Served = tokio::task::JoinHandle<anyhow::Result<()>>;

/// The provider's address, and the sandbox's task if it runs here.
async fn payments(
    options: &Serve,
    keys: &Keys,
    shop: SocketAddr,
    stopped: &watch::Receiver<bool>,
) -> anyhow::Result<(String, Option<Served>)> {
    if let Some(url) = &options.payments_url {
        return Ok((url.trim_end_matches('/').to_owned(), None));
    }
    let listener = TcpListener::bind(options.payments_listen)
        .await
        .with_context(|| format!("cannot listen on {} for the payment sandbox", options.payments_listen))?;
    let url = format!("http://{}", reachable(listener.local_addr()?));
    let addresses = sandbox::Addresses {
        public_url: options.payments_public_url.clone().unwrap_or_else(|| url.clone()),
        webhook_url: format!("http://{}/webhooks/payments", reachable(shop)),
    };
    let task = tokio::spawn(run(listener, sandbox::router(keys, addresses)?, stopped.clone()));
    Ok((url, Some(task)))
}

/// An address this process can connect to: a listener on all addresses is reached on loopback.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

/// The sandbox alone, for a shop that runs elsewhere.
pub async fn serve_sandbox(listen: SocketAddr, addresses: sandbox::Addresses, keys: &Keys) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    let address = listener.local_addr()?;
    let public_url = match addresses.public_url.as_str() {
        "" => format!("http://{address}"),
        given => given.trim_end_matches('/').to_owned(),
    };
    let (stop, stopped) = watch::channel(false);
    let router = sandbox::router(keys, sandbox::Addresses { public_url, ..addresses })?;
    let task = tokio::spawn(run(listener, router, stopped));
    tracing::info!(%address, "the payment sandbox is open");
    stop_signal().await?;
    stop.send_replace(true);
    task.await.context("the sandbox's task failed")?
}

async fn run(listener: TcpListener, router: Router, mut stopped: watch::Receiver<bool>) -> anyhow::Result<()> {
    let stopping = async move {
        // An error means that the sender is gone, which is a reason to stop too.
        stopped.wait_for(|stopped| *stopped).await.ok();
    };
    axum::serve(listener, router).with_graceful_shutdown(stopping).await.context("serving failed")
}

async fn stop_signal() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    // Both are cancel-safe; whichever comes first ends the process.
    tokio::select! {
        done = tokio::signal::ctrl_c() => done.context("cannot wait for Ctrl-C"),
        _ = terminate.recv() => Ok(()),
    }
}
