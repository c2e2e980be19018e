//! What a client sends before it has a tag: startup, SSL, GSS and cancel requests.

use bytes::BytesMut;

use crate::frame::put_cstr;
use crate::read::{Malformed, Reader};

/// Postgres's own cap (MAX_STARTUP_PACKET_LENGTH, src/include/libpq/pqcomm.h).
pub const SIZE_MAX: usize = 10_000;

const SSL: u32 = 80_877_103;
const GSS: u32 = 80_877_104;
const CANCEL: u32 = 80_877_102;
const PROTOCOL_MAJOR: u32 = 3;

/// The newest minor version of protocol 3 that weir speaks.
pub const PROTOCOL_MINOR_MAX: u16 = 2;

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request<'a> {
    Ssl,
    Gss,
    Cancel {
        process: i32,
        /// Of any length: a wrong one is as good as a wrong value.
        secret: &'a [u8],
    },
    Startup(Startup<'a>),
    /// A protocol major version weir does not speak.
    Unsupported(u32),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Startup<'a> {
    pub minor: u16,
    /// Names and values in the order sent.
    pub parameters: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Startup<'a> {
    pub fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.parameters.iter().rev().find(|(key, _)| *key == name.as_bytes()).map(|(_, value)| *value)
    }

    /// Protocol extensions (`_pq_.` options) the client asked for; weir knows none.
    pub fn extensions(&self) -> impl Iterator<Item = &'a [u8]> {
        self.parameters.iter().map(|(name, _)| *name).filter(|name| name.starts_with(b"_pq_."))
    }
}

/// Total size of the request at the start of `buffer`, once its length has arrived.
pub fn size(buffer: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some((head, _)) = buffer.split_first_chunk::<4>() else { return Ok(None) };
    let size = u32::from_be_bytes(*head) as usize;
    if (8..=SIZE_MAX).contains(&size) { Ok(Some(size)) } else { Err(Malformed) }
}

/// Parses one whole request (length field included).
pub fn parse(request: &[u8]) -> Result<Request<'_>, Malformed> {
    let mut reader = Reader::new(request);
    if reader.u32()? as usize != request.len() {
        return Err(Malformed);
    }
    match reader.u32()? {
        SSL => reader.end().map(|()| Request::Ssl),
        GSS => reader.end().map(|()| Request::Gss),
        CANCEL => Ok(Request::Cancel { process: reader.i32()?, secret: reader.rest() }),
        version if version >> 16 == PROTOCOL_MAJOR => {
            let mut parameters = Vec::new();
            loop {
                let name = reader.cstr()?;
                if name.is_empty() {
                    break;
                }
                parameters.push((name, reader.cstr()?));
            }
            reader.end()?;
            Ok(Request::Startup(Startup { minor: version as u16, parameters }))
        }
        version => Ok(Request::Unsupported(version)),
    }
}

/// A StartupMessage of protocol 3.0, for a Backend.
pub fn put_startup<T: AsRef<str>>(out: &mut BytesMut, parameters: &[(T, T)]) {
    put_startup_minor(out, 0, parameters);
}

/// A StartupMessage of protocol 3.`minor`.
pub fn put_startup_minor<T: AsRef<str>>(out: &mut BytesMut, minor: u16, parameters: &[(T, T)]) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&(PROTOCOL_MAJOR << 16 | u32::from(minor)).to_be_bytes());
    for (name, value) in parameters {
        put_cstr(out, name.as_ref().as_bytes());
        put_cstr(out, value.as_ref().as_bytes());
    }
    out.extend_from_slice(&[0]);
    let size = (out.len() - start) as u32;
    out[start..start + 4].copy_from_slice(&size.to_be_bytes());
}

/// A CancelRequest, for a Backend.
pub fn put_cancel(out: &mut BytesMut, process: i32, secret: &[u8]) {
    out.extend_from_slice(&(12 + secret.len() as u32).to_be_bytes());
    out.extend_from_slice(&CANCEL.to_be_bytes());
    out.extend_from_slice(&process.to_be_bytes());
    out.extend_from_slice(secret);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn startup_round_trips() {
        let mut out = BytesMut::new();
        put_startup(&mut out, &[("user", "ann"), ("database", "shop"), ("user", "bob")]);
        assert_eq!(size(&out), Ok(Some(out.len())));
        let Ok(Request::Startup(startup)) = parse(&out) else { panic!("not a startup") };
        assert_eq!(startup.get("user"), Some(&b"bob"[..]), "the last one counts, as in Postgres");
        assert_eq!(startup.get("nope"), None);
    }

    #[test]
    fn hostile_requests_are_malformed_not_fatal() {
        assert_eq!(size(&[0, 0, 0, 7]), Err(Malformed));
        assert_eq!(size(&[0xff; 4]), Err(Malformed));
        assert_eq!(size(&[0, 0]), Ok(None));
        for bad in [
            &b"\0\0\0\x09\0\x03\0\0\0x"[..],            // length lies
            &b"\0\0\0\x0b\0\x03\0\0a\0b"[..],           // value without NUL
            &b"\0\0\0\x0a\0\x03\0\0\0x"[..],            // bytes after the end
            &b"\0\0\0\x0c\x04\xd2\x16\x2f\0\0\0\0"[..], // SSLRequest with a tail
            &b"\0\0\0\x0b\x04\xd2\x16\x2e\0\0\0"[..],   // cancel without a whole process number
        ] {
            assert_eq!(parse(bad), Err(Malformed), "{bad:?}");
        }
    }
}
