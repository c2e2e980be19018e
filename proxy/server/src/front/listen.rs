//! Accepting clients, within limits, each served by a task of its own.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use weir_core::error::{Blame, UserError, sqlstate};

use super::client::{Client, Socket};
use super::startup::{Hello, hello};
use crate::app::App;

/// Pause after accept fails for lack of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until `stop` resolves.
pub async fn run(app: Arc<App>, listener: TcpListener, stop: impl Future<Output = ()>) {
    tokio::pin!(stop);
    loop {
        // Both futures are cancel-safe: accept loses nothing, and `stop` is polled again by reference.
        let accepted = tokio::select! {
            biased;
            () = &mut stop => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let app = Arc::clone(&app);
                tokio::spawn(async move {
                    if let Err(error) = serve(app, stream).await {
                        tracing::debug!("client connection failed: {error}");
                    }
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a client: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(app: Arc<App>, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive =
        socket2::TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(10));
    socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    let address = stream.peer_addr()?;
    let mut client = Client::new(Socket::Plain(stream), address);
    let Some(_seat) = app.clients.enter() else {
        client.put_error(&too_many(&app));
        return client.send().await;
    };
    // Boxed: what only a log-in or the console needs would else be part of every session's task for all its life.
    let hello = tokio::time::timeout(app.config().limits.login_time_max, Box::pin(hello(&app, client))).await;
    match hello {
        Ok(Ok(Hello::Session(session))) => session.run().await,
        Ok(Ok(Hello::Replication(replication))) => Box::pin(replication.run()).await,
        Ok(Ok(Hello::Admin(client, user))) => Box::pin(crate::console::run(&app, *client, &user)).await?,
        Ok(Ok(Hello::Done)) => {}
        Ok(Err(error)) => return Err(error),
        Err(_) => tracing::debug!(%address, "login took too long"),
    }
    Ok(())
}

fn too_many(app: &App) -> UserError {
    UserError::new(Blame::Proxy, sqlstate::TOO_MANY_CONNECTIONS, "too many clients")
        .detail(format!("{} of {} client connections are in use", app.clients.now(), app.clients.max()))
        .hint("Raise limits.client_connections_max, or close idle connections.")
        .fatal()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::session::Session;

    fn size<A, B, F>(_: impl FnOnce(A, B) -> F) -> usize {
        size_of::<F>()
    }

    /// Ten thousand idle clients are ten thousand of these. What grew it is usually a rare way that is not boxed.
    #[test]
    fn a_task_is_small() {
        let (task, session) = (size(serve), size_of::<Session>());
        assert!(task + session <= 4 * 1024 + 512, "task {task}, session {session} bytes");
    }
}
