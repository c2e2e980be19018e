//! What proxies of one tier say to each other, about writes and about requests to cancel, as bytes and messages.
//!
//! Invariant: frames are cut like those of Postgres (tag, length that counts itself, body), and a body must be consumed
//! exactly. Decoding is total: what is not a message is an error, never a panic or a guess. Numbers are big-endian.
//!
//! Non-goals: who may speak (the proof of the shared secret is made and checked elsewhere), and what is done about it.

use bytes::{BufMut, BytesMut};

use crate::frame;
use crate::read::{Malformed, Reader};

/// Spoken by this build; a peer with another one is not understood.
pub const VERSION: u16 = 2;
/// Longest frame before the peer has proved that it knows the secret, in bytes.
pub const GREETING_BYTES_MAX: usize = 64;
/// Longest frame afterwards: an [`Message::Attach`] with every write under way.
pub const FRAME_BYTES_MAX: usize = 64 << 20;

/// A write that has been announced and not ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Write {
    /// Named by the proxy that makes it; 0 stands for one whose proxy is gone.
    pub token: u64,
    /// The server process that has it.
    pub pid: i32,
    /// It may change what tables there are and what statements mean.
    pub schema: bool,
    /// Indexes of its dependency words, ascending.
    pub words: Vec<u16>,
}

/// How a write ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Nothing was written.
    Nothing,
    /// At or below this WAL position of the primary, in its life of that name.
    At { lsn: u64, life: u64 },
    /// Written; the one who says so does not know the position.
    Somewhere,
}

/// `from` and `to` name members: one proxy at one shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// The first one, in both directions.
    Hello { version: u16, nonce: [u8; 16] },
    /// Shows that the sender knows the secret.
    Proof { mac: [u8; 32] },
    /// Is member `to` there? Answered by [`Message::Heard`].
    Ask { to: u64, token: u64 },
    /// Which stamps do these words have? Answered by [`Message::Stamps`].
    AskStamps { to: u64, token: u64, first: u16, count: u16 },
    /// One for each word asked for, in order; 0: something is pending. None at all: the member does not serve.
    Stamps { by: u64, token: u64, stamps: Vec<u64> },
    /// Something is about to be written; answered by [`Message::Heard`].
    Announce { from: u64, to: u64, write: Write },
    /// Member `by` knows of it from now on. Not `known`: there is no such member, or it has no room.
    Heard { by: u64, token: u64, known: bool },
    /// A write that was announced is over.
    Over { from: u64, to: u64, token: u64, ending: Ending },
    /// From now on `from` announces all its writes to `to`, which joined with that epoch; these are under way now. Answered by
    /// [`Message::Heard`].
    Attach {
        from: u64,
        to: u64,
        token: u64,
        joined: u64,
        /// It answers from its cache already.
        serves: bool,
        /// It has never written anything that is not among `writes`.
        complete: bool,
        writes: Vec<Write>,
        /// Writes of proxies that are gone.
        orphans: Vec<Write>,
    },
    /// Answered by [`Message::Pong`], on the connection on which `to` announces its writes to `from`.
    Ping { from: u64, to: u64, at_us: u64 },
    /// Everything that `from` had announced when it was asked has gone before this. `at_us`: as in the question.
    Pong { from: u64, to: u64, at_us: u64 },
    /// A client asks to cancel what the session with this key runs, which may be one of the receiver's. Never answered.
    Cancel { process: i32, secret: Vec<u8> },
}

/// Longest secret of a cancel key (MAX_CANCEL_KEY_LENGTH in src/include/storage/procsignal.h is 32).
const CANCEL_SECRET_BYTES_MAX: usize = 256;

mod tag {
    pub const HELLO: u8 = b'h';
    pub const PROOF: u8 = b'p';
    pub const ASK: u8 = b'?';
    pub const ASK_STAMPS: u8 = b'W';
    pub const STAMPS: u8 = b'w';
    pub const ANNOUNCE: u8 = b'A';
    pub const HEARD: u8 = b'a';
    pub const OVER: u8 = b'O';
    pub const ATTACH: u8 = b'T';
    pub const PING: u8 = b'Q';
    pub const PONG: u8 = b'q';
    pub const CANCEL: u8 = b'C';
}

impl Message {
    /// Appends the frame.
    pub fn put(&self, out: &mut BytesMut) {
        match self {
            Message::Hello { version, nonce } => frame::put(out, tag::HELLO, |out| {
                out.put_u16(*version);
                out.extend_from_slice(nonce);
            }),
            Message::Proof { mac } => frame::put(out, tag::PROOF, |out| out.extend_from_slice(mac)),
            Message::Ask { to, token } => frame::put(out, tag::ASK, |out| put_numbers(out, &[*to, *token])),
            Message::AskStamps { to, token, first, count } => frame::put(out, tag::ASK_STAMPS, |out| {
                put_numbers(out, &[*to, *token]);
                out.put_u16(*first);
                out.put_u16(*count);
            }),
            Message::Stamps { by, token, stamps } => frame::put(out, tag::STAMPS, |out| {
                put_numbers(out, &[*by, *token]);
                out.put_u16(stamps.len() as u16);
                put_numbers(out, stamps);
            }),
            Message::Announce { from, to, write } => frame::put(out, tag::ANNOUNCE, |out| {
                put_numbers(out, &[*from, *to]);
                put_write(out, write);
            }),
            Message::Heard { by, token, known } => frame::put(out, tag::HEARD, |out| {
                put_numbers(out, &[*by, *token]);
                out.put_u8(u8::from(*known));
            }),
            Message::Over { from, to, token, ending } => frame::put(out, tag::OVER, |out| {
                put_numbers(out, &[*from, *to, *token]);
                let (kind, lsn, life) = match *ending {
                    Ending::Nothing => (0, 0, 0),
                    Ending::At { lsn, life } => (1, lsn, life),
                    Ending::Somewhere => (2, 0, 0),
                };
                out.put_u8(kind);
                put_numbers(out, &[lsn, life]);
            }),
            Message::Attach { from, to, token, joined, serves, complete, writes, orphans } => {
                frame::put(out, tag::ATTACH, |out| {
                    put_numbers(out, &[*from, *to, *token, *joined]);
                    out.put_u8(u8::from(*serves));
                    out.put_u8(u8::from(*complete));
                    for list in [writes, orphans] {
                        out.put_u32(list.len() as u32);
                        for write in list {
                            put_write(out, write);
                        }
                    }
                });
            }
            Message::Ping { from, to, at_us } => {
                frame::put(out, tag::PING, |out| put_numbers(out, &[*from, *to, *at_us]));
            }
            Message::Pong { from, to, at_us } => {
                frame::put(out, tag::PONG, |out| put_numbers(out, &[*from, *to, *at_us]));
            }
            Message::Cancel { process, secret } => frame::put(out, tag::CANCEL, |out| {
                out.put_i32(*process);
                out.put_u16(secret.len() as u16);
                out.extend_from_slice(secret);
            }),
        }
    }

    /// Reads the body of a frame.
    pub fn read(tag: u8, body: &[u8]) -> Result<Message, Malformed> {
        let mut reader = Reader::new(body);
        let message = match tag {
            tag::HELLO => Message::Hello { version: short(&mut reader)?, nonce: reader.array()? },
            tag::PROOF => Message::Proof { mac: reader.array()? },
            tag::ASK => Message::Ask { to: number(&mut reader)?, token: number(&mut reader)? },
            tag::ASK_STAMPS => Message::AskStamps {
                to: number(&mut reader)?,
                token: number(&mut reader)?,
                first: short(&mut reader)?,
                count: short(&mut reader)?,
            },
            tag::STAMPS => {
                let (by, token) = (number(&mut reader)?, number(&mut reader)?);
                let count = short(&mut reader)?;
                let stamps = (0..count).map(|_| number(&mut reader)).collect::<Result<_, Malformed>>()?;
                Message::Stamps { by, token, stamps }
            }
            tag::ANNOUNCE => {
                Message::Announce { from: number(&mut reader)?, to: number(&mut reader)?, write: write(&mut reader)? }
            }
            tag::HEARD => {
                Message::Heard { by: number(&mut reader)?, token: number(&mut reader)?, known: flag(&mut reader)? }
            }
            tag::OVER => Message::Over {
                from: number(&mut reader)?,
                to: number(&mut reader)?,
                token: number(&mut reader)?,
                ending: ending(&mut reader)?,
            },
            tag::ATTACH => Message::Attach {
                from: number(&mut reader)?,
                to: number(&mut reader)?,
                token: number(&mut reader)?,
                joined: number(&mut reader)?,
                serves: flag(&mut reader)?,
                complete: flag(&mut reader)?,
                writes: writes(&mut reader)?,
                orphans: writes(&mut reader)?,
            },
            tag::PING => {
                Message::Ping { from: number(&mut reader)?, to: number(&mut reader)?, at_us: number(&mut reader)? }
            }
            tag::PONG => {
                Message::Pong { from: number(&mut reader)?, to: number(&mut reader)?, at_us: number(&mut reader)? }
            }
            tag::CANCEL => {
                let process = reader.i32()?;
                let length = usize::from(short(&mut reader)?);
                if length > CANCEL_SECRET_BYTES_MAX {
                    return Err(Malformed);
                }
                Message::Cancel { process, secret: reader.bytes(length)?.to_vec() }
            }
            _ => return Err(Malformed),
        };
        reader.end()?;
        Ok(message)
    }
}

fn put_numbers(out: &mut BytesMut, numbers: &[u64]) {
    for number in numbers {
        out.put_u64(*number);
    }
}

fn put_write(out: &mut BytesMut, write: &Write) {
    out.put_u64(write.token);
    out.put_i32(write.pid);
    out.put_u8(u8::from(write.schema));
    out.put_u16(write.words.len() as u16);
    write.words.iter().for_each(|word| out.put_u16(*word));
}

fn number(reader: &mut Reader<'_>) -> Result<u64, Malformed> {
    Ok(u64::from_be_bytes(reader.array()?))
}

fn short(reader: &mut Reader<'_>) -> Result<u16, Malformed> {
    Ok(u16::from_be_bytes(reader.array()?))
}

fn flag(reader: &mut Reader<'_>) -> Result<bool, Malformed> {
    match reader.array::<1>()? {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(Malformed),
    }
}

fn ending(reader: &mut Reader<'_>) -> Result<Ending, Malformed> {
    let [kind] = reader.array::<1>()?;
    let (lsn, life) = (number(reader)?, number(reader)?);
    match (kind, lsn, life) {
        (0, 0, 0) => Ok(Ending::Nothing),
        (1, lsn, life) => Ok(Ending::At { lsn, life }),
        (2, 0, 0) => Ok(Ending::Somewhere),
        _ => Err(Malformed),
    }
}

fn write(reader: &mut Reader<'_>) -> Result<Write, Malformed> {
    let token = number(reader)?;
    let pid = reader.i32()?;
    let schema = flag(reader)?;
    let count = short(reader)?;
    let words = (0..count).map(|_| short(reader)).collect::<Result<Vec<u16>, Malformed>>()?;
    // Each once: a word that is raised once is lowered once.
    if words.is_sorted_by(|one, next| one < next) { Ok(Write { token, pid, schema, words }) } else { Err(Malformed) }
}

/// Grows with what is there, not with the count that is claimed.
fn writes(reader: &mut Reader<'_>) -> Result<Vec<Write>, Malformed> {
    let count = u32::from_be_bytes(reader.array()?);
    (0..count).map(|_| write(reader)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8]) -> Result<Message, Malformed> {
        let frame = frame::peek(bytes, FRAME_BYTES_MAX).map_err(|_| Malformed)?.ok_or(Malformed)?;
        Message::read(frame.tag, frame.body)
    }

    fn a_write() -> impl Strategy<Value = Write> {
        let words = proptest::collection::btree_set(any::<u16>(), 0..9);
        (any::<(u64, i32, bool)>(), words).prop_map(|((token, pid, schema), words)| Write {
            token,
            pid,
            schema,
            words: words.into_iter().collect(),
        })
    }

    fn a_message() -> impl Strategy<Value = Message> {
        let ending = prop_oneof![
            Just(Ending::Nothing),
            Just(Ending::Somewhere),
            any::<(u64, u64)>().prop_map(|(lsn, life)| Ending::At { lsn, life })
        ];
        let list = || proptest::collection::vec(a_write(), 0..5);
        prop_oneof![
            any::<(u16, [u8; 16])>().prop_map(|(version, nonce)| Message::Hello { version, nonce }),
            any::<[u8; 32]>().prop_map(|mac| Message::Proof { mac }),
            any::<(u64, u64)>().prop_map(|(to, token)| Message::Ask { to, token }),
            (any::<i32>(), proptest::collection::vec(any::<u8>(), 0..40))
                .prop_map(|(process, secret)| Message::Cancel { process, secret }),
            any::<(u64, u64, u16, u16)>().prop_map(|(to, token, first, count)| Message::AskStamps {
                to,
                token,
                first,
                count
            }),
            (any::<(u64, u64)>(), proptest::collection::vec(any::<u64>(), 0..9))
                .prop_map(|((by, token), stamps)| Message::Stamps { by, token, stamps }),
            any::<(u64, u64, bool)>().prop_map(|(by, token, known)| Message::Heard { by, token, known }),
            (any::<(u64, u64)>(), a_write()).prop_map(|((from, to), write)| Message::Announce { from, to, write }),
            (any::<(u64, u64, u64)>(), ending).prop_map(|((from, to, token), ending)| Message::Over {
                from,
                to,
                token,
                ending
            }),
            (any::<(u64, u64, u64)>(), any::<bool>()).prop_map(|((from, to, at_us), asks)| if asks {
                Message::Ping { from, to, at_us }
            } else {
                Message::Pong { from, to, at_us }
            }),
            (any::<(u64, u64, u64, u64, bool, bool)>(), list(), list()).prop_map(
                |((from, to, token, joined, serves, complete), writes, orphans)| Message::Attach {
                    from,
                    to,
                    token,
                    joined,
                    serves,
                    complete,
                    writes,
                    orphans
                }
            ),
        ]
    }

    proptest! {
        #[test]
        fn messages_survive_the_wire(message in a_message()) {
            let mut out = BytesMut::new();
            message.put(&mut out);
            prop_assert_eq!(decode(&out), Ok(message));
        }

        #[test]
        fn no_message_is_read_from_less_or_more_of_it(message in a_message(), cut in 0_usize..64) {
            let mut out = BytesMut::new();
            message.put(&mut out);
            let body = &out[frame::HEADER..];
            if cut < body.len() {
                prop_assert!(Message::read(out[0], &body[..cut]).is_err());
            }
            let longer = [body, &[0]].concat();
            prop_assert!(Message::read(out[0], &longer).is_err());
        }

        #[test]
        fn decoding_is_total(tag in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::read(tag, &body);
        }
    }

    #[test]
    fn words_that_are_out_of_order_or_twice_are_refused() {
        for words in [vec![2, 1], vec![1, 1]] {
            let mut out = BytesMut::new();
            Message::Announce { from: 1, to: 2, write: Write { token: 1, pid: 1, schema: false, words } }.put(&mut out);
            assert!(decode(&out).is_err());
        }
    }
}
