//! Messages a server sends: views for the few that weir looks into, writers for those it sends to clients itself.

use bytes::{Bytes, BytesMut};

use crate::frame::{put, put_cstr};
use crate::read::{Malformed, Reader};

/// Message tags.
pub mod tag {
    pub const AUTHENTICATION: u8 = b'R';
    pub const BACKEND_KEY_DATA: u8 = b'K';
    pub const BIND_COMPLETE: u8 = b'2';
    pub const CLOSE_COMPLETE: u8 = b'3';
    pub const COMMAND_COMPLETE: u8 = b'C';
    pub const COPY_BOTH: u8 = b'W';
    pub const COPY_DATA: u8 = b'd';
    pub const COPY_DONE: u8 = b'c';
    pub const COPY_IN: u8 = b'G';
    pub const COPY_OUT: u8 = b'H';
    pub const DATA_ROW: u8 = b'D';
    pub const EMPTY_QUERY: u8 = b'I';
    pub const ERROR: u8 = b'E';
    pub const FUNCTION_RESULT: u8 = b'V';
    pub const NEGOTIATE_PROTOCOL: u8 = b'v';
    pub const NO_DATA: u8 = b'n';
    pub const NOTICE: u8 = b'N';
    pub const NOTIFICATION: u8 = b'A';
    pub const PARAMETER_DESCRIPTION: u8 = b't';
    pub const PARAMETER_STATUS: u8 = b'S';
    pub const PARSE_COMPLETE: u8 = b'1';
    pub const PORTAL_SUSPENDED: u8 = b's';
    pub const READY: u8 = b'Z';
    pub const ROW_DESCRIPTION: u8 = b'T';
}

pub const PARSE_COMPLETE: &[u8] = &[tag::PARSE_COMPLETE, 0, 0, 0, 4];
pub const BIND_COMPLETE: &[u8] = &[tag::BIND_COMPLETE, 0, 0, 0, 4];
pub const CLOSE_COMPLETE: &[u8] = &[tag::CLOSE_COMPLETE, 0, 0, 0, 4];
pub const NO_DATA: &[u8] = &[tag::NO_DATA, 0, 0, 0, 4];
pub const PORTAL_SUSPENDED: &[u8] = &[tag::PORTAL_SUSPENDED, 0, 0, 0, 4];
pub const EMPTY_QUERY: &[u8] = &[tag::EMPTY_QUERY, 0, 0, 0, 4];
/// ParameterDescription of a statement without parameters.
pub const NO_PARAMETERS: &[u8] = &[tag::PARAMETER_DESCRIPTION, 0, 0, 0, 6, 0, 0];
/// AuthenticationOk.
pub const AUTHENTICATION_OK: &[u8] = &[tag::AUTHENTICATION, 0, 0, 0, 8, 0, 0, 0, 0];

/// Transaction status of ReadyForQuery.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Status {
    #[default]
    Idle,
    InTransaction,
    Failed,
}

impl Status {
    pub fn read(body: &[u8]) -> Result<Self, Malformed> {
        match body {
            b"I" => Ok(Status::Idle),
            b"T" => Ok(Status::InTransaction),
            b"E" => Ok(Status::Failed),
            _ => Err(Malformed),
        }
    }

    pub fn byte(self) -> u8 {
        match self {
            Status::Idle => b'I',
            Status::InTransaction => b'T',
            Status::Failed => b'E',
        }
    }
}

pub fn put_ready(out: &mut BytesMut, status: Status) {
    out.extend_from_slice(&[tag::READY, 0, 0, 0, 5, status.byte()]);
}

pub fn put_command_complete(out: &mut BytesMut, command: &str) {
    put(out, tag::COMMAND_COMPLETE, |out| put_cstr(out, command.as_bytes()));
}

pub fn put_parameter_status(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    put(out, tag::PARAMETER_STATUS, |out| {
        put_cstr(out, name);
        put_cstr(out, value);
    });
}

/// Name and value of a ParameterStatus body.
pub fn read_parameter_status(body: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let mut reader = Reader::new(body);
    let pair = (reader.cstr()?, reader.cstr()?);
    reader.end()?;
    Ok(pair)
}

pub fn put_backend_key(out: &mut BytesMut, process: i32, secret: &[u8]) {
    put(out, tag::BACKEND_KEY_DATA, |out| {
        out.extend_from_slice(&process.to_be_bytes());
        out.extend_from_slice(secret);
    });
}

/// NegotiateProtocolVersion: the newest minor version spoken and the options not understood.
pub fn put_negotiate(out: &mut BytesMut, minor: u16, unknown: &[&[u8]]) {
    put(out, tag::NEGOTIATE_PROTOCOL, |out| {
        out.extend_from_slice(&(3 << 16 | u32::from(minor)).to_be_bytes());
        out.extend_from_slice(&(unknown.len() as u32).to_be_bytes());
        for name in unknown {
            put_cstr(out, name);
        }
    });
}

/// Fields of an error or notice that weir writes.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// ERROR, FATAL, WARNING …
    pub severity: &'a str,
    pub sqlstate: &'a str,
    pub message: &'a str,
    pub detail: Option<&'a str>,
    pub hint: Option<&'a str>,
    /// The function in Postgres that raises this, where drivers tell errors apart by it.
    pub routine: Option<&'a str>,
}

impl Report<'_> {
    /// `tag` is [`tag::ERROR`] or [`tag::NOTICE`].
    pub fn put(&self, tag: u8, out: &mut BytesMut) {
        put(out, tag, |out| {
            let fields = [
                (b'S', Some(self.severity)),
                (b'V', Some(self.severity)),
                (b'C', Some(self.sqlstate)),
                (b'M', Some(self.message)),
                (b'D', self.detail),
                (b'H', self.hint),
                (b'R', self.routine),
            ];
            for (code, text) in fields {
                if let Some(text) = text {
                    out.extend_from_slice(&[code]);
                    put_cstr(out, text.as_bytes());
                }
            }
            out.extend_from_slice(&[0]);
        });
    }
}

/// One field of an ErrorResponse or NoticeResponse body, e.g. `b'C'` for the SQLSTATE.
pub fn report_field(body: &[u8], code: u8) -> Option<&[u8]> {
    let mut reader = Reader::new(body);
    loop {
        match reader.u8().ok()? {
            0 => return None,
            found => {
                let text = reader.cstr().ok()?;
                if found == code {
                    return Some(text);
                }
            }
        }
    }
}

/// An ErrorResponse or NoticeResponse body with another text in a field that it has.
pub fn with_report_field(body: &[u8], code: u8, text: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(body.len() + text.len());
    let mut reader = Reader::new(body);
    while let Ok(found) = reader.u8() {
        let Some(old) = (found != 0).then(|| reader.cstr().ok()).flatten() else { break };
        out.extend_from_slice(&[found]);
        put_cstr(&mut out, if found == code { text } else { old });
    }
    out.extend_from_slice(&[0]);
    out.freeze()
}

/// An ErrorResponse or NoticeResponse body without a field.
pub fn without_report_field(body: &[u8], code: u8) -> Bytes {
    let mut out = BytesMut::with_capacity(body.len());
    let mut reader = Reader::new(body);
    while let Ok(found) = reader.u8() {
        let Some(text) = (found != 0).then(|| reader.cstr().ok()).flatten() else { break };
        if found != code {
            out.extend_from_slice(&[found]);
            put_cstr(&mut out, text);
        }
    }
    out.extend_from_slice(&[0]);
    out.freeze()
}

/// An ErrorResponse or NoticeResponse body with texts added to fields: behind what is there, or as new fields.
pub fn with_added_fields(body: &[u8], added: &[(u8, &str)]) -> Bytes {
    let mut changed = Bytes::copy_from_slice(body);
    for (code, text) in added {
        let old = report_field(&changed, *code).map(|old| String::from_utf8_lossy(old).into_owned());
        changed = match old {
            Some(old) => with_report_field(&changed, *code, format!("{old}\n{text}").as_bytes()),
            None => {
                let mut out = BytesMut::from(changed.strip_suffix(&[0]).unwrap_or(&changed));
                out.extend_from_slice(&[*code]);
                put_cstr(&mut out, text.as_bytes());
                out.extend_from_slice(&[0]);
                out.freeze()
            }
        };
    }
    changed
}

/// The text of a CommandComplete body, without its NUL.
pub fn command_tag(body: &[u8]) -> &[u8] {
    body.strip_suffix(&[0]).unwrap_or(body)
}

/// The row count at the end of a command tag ("SELECT 5", "INSERT 0 1"); `None` when it has none.
pub fn command_rows(tag: &[u8]) -> Option<u64> {
    let digits = tag.rsplit(|byte| *byte == b' ').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_carry_their_fields() {
        let mut out = BytesMut::new();
        Report { severity: "ERROR", sqlstate: "0A000", message: "no", detail: None, hint: Some("do"), routine: None }
            .put(tag::ERROR, &mut out);
        assert_eq!(report_field(&out[5..], b'C'), Some(&b"0A000"[..]));
        assert_eq!(report_field(&out[5..], b'D'), None);
        assert_eq!(report_field(&out[5..], b'H'), Some(&b"do"[..]));
        assert_eq!(report_field(b"Cx", b'C'), None);
    }

    #[test]
    fn rows_are_read_off_command_tags() {
        assert_eq!(command_rows(b"INSERT 0 12"), Some(12));
        assert_eq!(command_rows(b"SELECT 3"), Some(3));
        assert_eq!(command_rows(b"CREATE TABLE"), None);
    }
}
