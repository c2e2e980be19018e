//! Cutting a byte stream into frames: tag, int32 length (which counts itself), body.
//!
//! Non-goal: looking into bodies. A frame is complete in the buffer or it is not handed out, except through
//! [`header`], which lets a relay pass the start of a large frame on before its end has arrived.

use bytes::BytesMut;

/// Tag byte plus length field.
pub const HEADER: usize = 5;

/// A length no peer may send.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("frame '{}' claims {length} bytes", char::from(*tag))]
pub struct BadLength {
    pub tag: u8,
    pub length: u32,
}

/// One complete frame.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    pub tag: u8,
    pub body: &'a [u8],
    /// Header and body.
    pub raw: &'a [u8],
}

/// Tag and total size (header included) of the frame at the start of `buffer`; `None` while fewer than five bytes are there.
pub fn header(buffer: &[u8], size_max: usize) -> Result<Option<(u8, usize)>, BadLength> {
    let Some((head, _)) = buffer.split_first_chunk::<HEADER>() else { return Ok(None) };
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    let total = length as usize + 1;
    if length < 4 || total > size_max {
        return Err(BadLength { tag: head[0], length });
    }
    Ok(Some((head[0], total)))
}

/// The frame at the start of `buffer`, if all of it has arrived.
pub fn peek(buffer: &[u8], size_max: usize) -> Result<Option<Frame<'_>>, BadLength> {
    match header(buffer, size_max)? {
        Some((tag, total)) if buffer.len() >= total => {
            Ok(Some(Frame { tag, body: &buffer[HEADER..total], raw: &buffer[..total] }))
        }
        _ => Ok(None),
    }
}

/// Appends a frame whose body `write` appends; the length is filled in afterwards.
pub fn put(out: &mut BytesMut, tag: u8, write: impl FnOnce(&mut BytesMut)) {
    out.extend_from_slice(&[tag, 0, 0, 0, 0]);
    let start = out.len();
    write(out);
    let length = (out.len() - start + 4) as u32;
    out[start - 4..start].copy_from_slice(&length.to_be_bytes());
}

/// Appends bytes and a NUL.
pub fn put_cstr(out: &mut BytesMut, text: &[u8]) {
    out.extend_from_slice(text);
    out.extend_from_slice(&[0]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_below_four_and_above_the_cap_are_refused() {
        assert!(header(&[b'Q', 0, 0, 0, 3], 100).is_err());
        assert!(header(&[b'Q', 0, 0, 0, 100], 100).is_err());
        assert!(header(&[b'Q', 0xff, 0xff, 0xff, 0xff], usize::MAX >> 1).is_ok());
        assert_eq!(header(&[b'Q', 0, 0, 0, 99], 100), Ok(Some((b'Q', 100))));
        assert_eq!(header(&[b'Q', 0, 0, 0], 100), Ok(None));
    }

    proptest! {
        #[test]
        fn written_frames_are_cut_again(bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..20), cut in 0usize..40) {
            let mut wire = BytesMut::new();
            for (index, body) in bodies.iter().enumerate() {
                put(&mut wire, b'a' + index as u8, |out| out.extend_from_slice(body));
            }
            let end = wire.len().saturating_sub(cut);
            let mut rest = &wire[..end];
            let mut seen = 0;
            while let Some(frame) = peek(rest, 1 << 20).expect("valid lengths") {
                prop_assert_eq!(frame.tag, b'a' + seen as u8);
                prop_assert_eq!(frame.body, &bodies[seen][..]);
                rest = &rest[frame.raw.len()..];
                seen += 1;
            }
            if cut == 0 {
                prop_assert_eq!(seen, bodies.len());
            }
        }
    }
}
