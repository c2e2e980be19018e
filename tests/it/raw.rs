//! A client that speaks frames: for what drivers hide or never do.

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use weir_wire::backend::tag;
use weir_wire::{frame, startup};

/// Longest wait for any reply; only a bug reaches it.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

pub struct Raw {
    stream: TcpStream,
    inbuf: BytesMut,
    pub out: BytesMut,
    pub process: i32,
    pub secret: Bytes,
    /// ParameterStatus as reported at login.
    pub parameters: Vec<(String, String)>,
    /// NegotiateProtocolVersion, if it came: the version, and the options not understood.
    pub negotiated: Option<(u32, Vec<String>)>,
}

impl Raw {
    /// Logs in as a URL of the harness says: `postgres://user:password@host:port/database`.
    pub async fn login(dsn: &str, settings: &[(&str, &str)]) -> Result<Raw> {
        Raw::login_minor(dsn, 0, settings).await
    }

    /// As [`Raw::login`], asking for protocol 3.`minor`.
    pub async fn login_minor(dsn: &str, minor: u16, settings: &[(&str, &str)]) -> Result<Raw> {
        let config: tokio_postgres::Config = dsn.parse()?;
        let port = *config.get_ports().first().context("port")?;
        let user = config.get_user().context("user")?.to_owned();
        let database = config.get_dbname().context("database")?.to_owned();
        let password = config.get_password().context("password")?.to_vec();
        let mut parameters = vec![("user", user.as_str()), ("database", database.as_str())];
        parameters.extend_from_slice(settings);
        let mut raw = Raw::start_minor(port, minor, &parameters).await?;
        raw.authenticate(&password).await?;
        loop {
            let (kind, body) = raw.next().await?;
            match kind {
                tag::BACKEND_KEY_DATA => {
                    raw.process = i32::from_be_bytes(body[..4].try_into()?);
                    raw.secret = body.slice(4..);
                }
                tag::PARAMETER_STATUS => {
                    let (name, value) = weir_wire::backend::read_parameter_status(&body)?;
                    raw.parameters.push((String::from_utf8(name.to_vec())?, String::from_utf8(value.to_vec())?));
                }
                tag::READY => return Ok(raw),
                tag::ERROR => bail!("refused: {}", error_text(&body)),
                _ => {}
            }
        }
    }

    /// Connects and leaves a StartupMessage in `out`; what follows is the caller's.
    pub async fn start(port: u16, parameters: &[(&str, &str)]) -> Result<Raw> {
        Self::start_minor(port, 0, parameters).await
    }

    async fn start_minor(port: u16, minor: u16, parameters: &[(&str, &str)]) -> Result<Raw> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let mut raw = Raw {
            stream,
            inbuf: BytesMut::new(),
            out: BytesMut::new(),
            process: 0,
            secret: Bytes::new(),
            parameters: Vec::new(),
            negotiated: None,
        };
        startup::put_startup_minor(&mut raw.out, minor, parameters);
        Ok(raw)
    }

    /// A SASLInitialResponse.
    pub fn put_sasl_initial(&mut self, mechanism: &str, message: &[u8]) {
        frame::put(&mut self.out, b'p', |out| {
            frame::put_cstr(out, mechanism.as_bytes());
            out.extend_from_slice(&(message.len() as i32).to_be_bytes());
            out.extend_from_slice(message);
        });
    }

    /// A PasswordMessage or SASLResponse.
    pub fn put_password(&mut self, message: &[u8]) {
        frame::put(&mut self.out, b'p', |out| out.extend_from_slice(message));
    }

    async fn authenticate(&mut self, password: &[u8]) -> Result<()> {
        let mut scram = ScramSha256::new(password, ChannelBinding::unsupported());
        loop {
            let (kind, body) = self.next().await?;
            if kind == tag::ERROR {
                bail!("refused: {}", error_text(&body));
            }
            if kind == tag::NEGOTIATE_PROTOCOL {
                let mut reader = weir_wire::read::Reader::new(&body);
                let (version, count) = (reader.u32()?, reader.u32()?);
                let names = (0..count).map(|_| Ok(String::from_utf8(reader.cstr()?.to_vec())?)).collect::<Result<_>>();
                self.negotiated = Some((version, names?));
                continue;
            }
            match i32::from_be_bytes(body[..4].try_into()?) {
                0 => return Ok(()),
                10 => {
                    let first = scram.message().to_vec();
                    self.put_sasl_initial("SCRAM-SHA-256", &first);
                }
                11 => {
                    scram.update(&body[4..])?;
                    let last = scram.message().to_vec();
                    self.put_password(&last);
                }
                12 => scram.finish(&body[4..])?,
                code => bail!("authentication {code}"),
            }
        }
    }

    /// For who reads at a pace of his own; nothing more can be read as frames then.
    pub fn stream_mut(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    pub async fn flush(&mut self) -> Result<()> {
        self.stream.write_all(&self.out.split()).await?;
        Ok(())
    }

    /// Sends what is in `out` and returns the next frame.
    pub async fn next(&mut self) -> Result<(u8, Bytes)> {
        self.flush().await?;
        loop {
            if let Some(found) = frame::peek(&self.inbuf, 1 << 30)? {
                let (kind, total) = (found.tag, found.raw.len());
                return Ok((kind, self.inbuf.split_to(total).freeze().slice(frame::HEADER..)));
            }
            let read =
                tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.inbuf)).await.context("no reply")??;
            if read == 0 {
                bail!("connection closed");
            }
        }
    }

    /// Ends the client's direction of the stream and goes on listening.
    pub async fn half_close(&mut self) -> Result<()> {
        self.stream.shutdown().await?;
        Ok(())
    }

    /// The bare stream, for one task that reads and another that writes.
    pub fn split(self) -> (tokio::net::tcp::OwnedReadHalf, tokio::net::tcp::OwnedWriteHalf) {
        self.stream.into_split()
    }

    /// Waits until a byte has come, and takes nothing. Cancel-safe.
    pub async fn peeked(&mut self) -> Result<()> {
        while self.inbuf.is_empty() {
            if self.stream.read_buf(&mut self.inbuf).await? == 0 {
                bail!("connection closed");
            }
        }
        Ok(())
    }

    /// All frames up to and including ReadyForQuery: their tags in order, e.g. `TDCZ`.
    pub async fn until_ready(&mut self) -> Result<(String, Vec<Bytes>)> {
        let (mut tags, mut bodies) = (String::new(), Vec::new());
        loop {
            let (kind, body) = self.next().await?;
            tags.push(char::from(kind));
            bodies.push(body);
            if kind == tag::READY {
                return Ok((tags, bodies));
            }
        }
    }

    /// A simple query: tags and the first column of every row as text.
    pub async fn query(&mut self, sql: &str) -> Result<(String, Vec<String>)> {
        weir_wire::frontend::put_query(&mut self.out, sql);
        let (tags, bodies) = self.until_ready().await?;
        let mut values = Vec::new();
        for (kind, body) in tags.bytes().zip(&bodies) {
            if kind == tag::DATA_ROW {
                let row = weir_wire::row::values(body)?;
                values.push(
                    row.first()
                        .copied()
                        .flatten()
                        .map_or("NULL".to_owned(), |text| String::from_utf8_lossy(text).into_owned()),
                );
            }
            if kind == tag::ERROR {
                values.push(error_text(body));
            }
        }
        Ok((tags, values))
    }

    pub async fn closed(&mut self) -> bool {
        loop {
            match self.next().await {
                Ok(_) => {}
                Err(_) => return true,
            }
        }
    }
}

/// `SQLSTATE message` of an ErrorResponse.
pub fn error_text(body: &[u8]) -> String {
    let field = |code| weir_wire::backend::report_field(body, code).map(String::from_utf8_lossy).unwrap_or_default();
    format!("{} {}", field(b'C'), field(b'M'))
}
