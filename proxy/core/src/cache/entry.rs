//! A stored reply, and its form outside the process.
//!
//! Invariant: [`Entry::decode`] of any bytes ends in an entry that was encoded by this format version, or in an error;
//! it never panics, and allocates no more than the input is long.
//!
//! A reply is the server's own frames, RowDescription, DataRows and CommandComplete, and nothing else: ParseComplete,
//! BindComplete and ReadyForQuery belong to the client that asked, and an error or a notice is never stored.

use bytes::Bytes;

use super::key::CacheKey;
use crate::fresh::{Observation, WordSet};
use crate::id::{Epoch, ShardId};
use crate::topology::hash::hash_bytes_extended;

/// The frames of one complete result.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    frames: Bytes,
    /// Length of the RowDescription frame, which comes first.
    description_bytes: usize,
    /// Start of the CommandComplete frame, which comes last.
    complete_at: usize,
}

impl Reply {
    /// Checks that `frames` are exactly one RowDescription, any DataRows and one CommandComplete. `None` otherwise.
    pub fn new(frames: Bytes) -> Option<Reply> {
        let description_bytes = frame_bytes(&frames, b'T')?;
        let mut at = description_bytes;
        while frames.get(at) == Some(&b'D') {
            at += frame_bytes(&frames[at..], b'D')?;
        }
        let complete_bytes = frame_bytes(&frames[at..], b'C')?;
        (at + complete_bytes == frames.len()).then_some(Reply { frames, description_bytes, complete_at: at })
    }

    /// All of it: the answer to a simple Query, or to Describe and Execute.
    pub fn frames(&self) -> &Bytes {
        &self.frames
    }

    /// RowDescription alone: the answer to Describe of a portal.
    pub fn description(&self) -> Bytes {
        self.frames.slice(..self.description_bytes)
    }

    /// DataRows and CommandComplete: the answer to Execute.
    pub fn rows(&self) -> Bytes {
        self.frames.slice(self.description_bytes..)
    }

    /// CommandComplete alone.
    pub fn complete(&self) -> Bytes {
        self.frames.slice(self.complete_at..)
    }
}

/// Length of the frame at the start of `bytes` if it has this tag and is complete.
fn frame_bytes(bytes: &[u8], tag: u8) -> Option<usize> {
    let (&found, rest) = bytes.split_first()?;
    let length = u32::from_be_bytes(*rest.first_chunk::<4>()?) as usize;
    (found == tag && length >= 4 && length <= rest.len()).then_some(1 + length)
}

/// A reply with the proof of when it was true.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub key: CacheKey,
    pub shard: ShardId,
    pub epoch: Epoch,
    /// The settled look before the read, found unmoved after it.
    pub seen: Observation,
    /// When it was stored, in milliseconds on the clock that [`super::Now`] is told.
    pub stored_at_ms: u64,
    pub reply: Reply,
}

/// Why bytes are not an entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum BadEntry {
    #[error("another format")]
    Format,
    #[error("longer than an entry may be")]
    TooLong,
    #[error("cut short, with bytes left over, or out of order")]
    Length,
    #[error("checksum mismatch")]
    Checksum,
    #[error("not a reply")]
    Reply,
}

/// "wrc" and the format version. A change of anything below changes the version.
const MAGIC: [u8; 4] = *b"wrc\x01";
const CHECKSUM_BYTES: usize = 8;
const CHECKSUM_SEED: u64 = 0x7765_6972;

impl Entry {
    /// Memory it takes, in bytes, for weighing.
    pub fn weight(&self) -> usize {
        size_of::<Entry>() + self.key.bytes().len() + self.reply.frames.len() + 10 * self.seen.versions().len()
    }

    /// Format: magic, checksum of the rest, shard u16, epoch u64, stored u64, word count u32, (index u16, stamp u64)*,
    /// key length u32, key, reply length u32, reply. Big-endian. `stamps`: of the entry's words, in their order; versions mean
    /// nothing to other processes. `None` for a length that does not fit its field.
    pub fn encode(&self, stamps: &[u64]) -> Option<Vec<u8>> {
        if stamps.len() != self.seen.versions().len() {
            return None;
        }
        let (key, reply) = (self.key.bytes(), &self.reply.frames);
        let mut out = Vec::with_capacity(64 + key.len() + reply.len() + 10 * self.seen.versions().len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; CHECKSUM_BYTES]);
        out.extend_from_slice(&self.shard.0.to_be_bytes());
        out.extend_from_slice(&self.epoch.0.to_be_bytes());
        out.extend_from_slice(&self.stored_at_ms.to_be_bytes());
        out.extend_from_slice(&u32::try_from(self.seen.versions().len()).ok()?.to_be_bytes());
        for (index, stamp) in self.seen.words().indexes().iter().zip(stamps) {
            out.extend_from_slice(&index.to_be_bytes());
            out.extend_from_slice(&stamp.to_be_bytes());
        }
        for part in [key, reply] {
            out.extend_from_slice(&u32::try_from(part.len()).ok()?.to_be_bytes());
            out.extend_from_slice(part);
        }
        let (head, body) = out.split_at_mut(MAGIC.len() + CHECKSUM_BYTES);
        head[MAGIC.len()..].copy_from_slice(&hash_bytes_extended(body, CHECKSUM_SEED).to_be_bytes());
        Some(out)
    }

    /// Reads what [`Entry::encode`] wrote; key and reply share the input's memory. What stands for versions are stamps; see
    /// [`Entry::adopt`].
    pub fn decode(input: Bytes, bytes_max: usize) -> Result<Entry, BadEntry> {
        if input.len() > bytes_max {
            return Err(BadEntry::TooLong);
        }
        let mut reader = Reader { input };
        if reader.array::<4>()? != MAGIC {
            return Err(BadEntry::Format);
        }
        let checksum = u64::from_be_bytes(reader.array()?);
        if hash_bytes_extended(&reader.input, CHECKSUM_SEED) != checksum {
            return Err(BadEntry::Checksum);
        }
        let shard = ShardId(u16::from_be_bytes(reader.array()?));
        let epoch = Epoch(u64::from_be_bytes(reader.array()?));
        let stored_at_ms = u64::from_be_bytes(reader.array()?);
        let seen = reader.observation()?;
        let key = CacheKey::from_bytes(reader.part()?);
        let reply = Reply::new(reader.part()?).ok_or(BadEntry::Reply)?;
        if !reader.input.is_empty() {
            return Err(BadEntry::Length);
        }
        Ok(Entry { key, shard, epoch, seen, stored_at_ms, reply })
    }

    /// Makes a decoded entry one of this process, if its words have the stamps they have here: `seen` is a look at them, `stamps`
    /// were read under it.
    pub fn adopt(mut self, seen: &Observation, stamps: &[u64]) -> Option<Entry> {
        if self.seen.words() != seen.words() || self.seen.versions() != stamps {
            return None;
        }
        self.seen = seen.clone();
        Some(self)
    }
}

struct Reader {
    input: Bytes,
}

impl Reader {
    fn take(&mut self, count: usize) -> Result<Bytes, BadEntry> {
        if count > self.input.len() {
            return Err(BadEntry::Length);
        }
        Ok(self.input.split_to(count))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadEntry> {
        let taken = self.take(N)?;
        taken.first_chunk::<N>().copied().ok_or(BadEntry::Length)
    }

    fn part(&mut self) -> Result<Bytes, BadEntry> {
        let count = u32::from_be_bytes(self.array()?) as usize;
        self.take(count)
    }

    fn observation(&mut self) -> Result<Observation, BadEntry> {
        let count = u32::from_be_bytes(self.array()?) as usize;
        let words = self.take(count.checked_mul(10).ok_or(BadEntry::Length)?)?;
        let pairs = || words.chunks_exact(10).filter_map(|pair| pair.split_first_chunk::<2>());
        let indexes = || pairs().map(|(index, _)| u16::from_be_bytes(*index));
        // Written in order and each once; anything else would pair versions with the wrong words.
        if !indexes().zip(indexes().skip(1)).all(|(one, next)| one < next) {
            return Err(BadEntry::Length);
        }
        let set = WordSet::from_indexes(indexes());
        let versions =
            pairs().filter_map(|(_, version)| version.first_chunk::<8>()).map(|one| u64::from_be_bytes(*one));
        Observation::settled(set, versions).ok_or(BadEntry::Length)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cache::key::KeyParts;

    const STAMPS: [u64; 3] = [10, 1 << 47, 3];
    const DESCRIPTION: &[u8] = b"T\0\0\0\x06\0\0";
    const ROW: &[u8] = b"D\0\0\0\x06\0\0";
    const COMPLETE: &[u8] = b"C\0\0\0\x0dSELECT 0\0";

    fn frames(parts: &[&[u8]]) -> Bytes {
        parts.concat().into()
    }

    pub fn entry(statement: &str) -> Entry {
        let key = CacheKey::new(&KeyParts {
            shard: ShardId(2),
            database: "shop",
            role: "app",
            statement,
            params: &[],
            result_formats: &[],
            settings: &[],
        });
        let set = WordSet::from_indexes([7, 1, 900]);
        Entry {
            key,
            shard: ShardId(2),
            epoch: Epoch(5),
            seen: Observation::settled(set, [10, 1 << 47, 3]).expect("three words"),
            stored_at_ms: 1000,
            reply: Reply::new(frames(&[DESCRIPTION, ROW, ROW, COMPLETE])).expect("a reply"),
        }
    }

    #[test]
    fn a_reply_is_a_description_rows_and_a_completion() {
        let reply = Reply::new(frames(&[DESCRIPTION, ROW, COMPLETE])).expect("a reply");
        assert_eq!(reply.description(), DESCRIPTION);
        assert_eq!(reply.rows(), [ROW, COMPLETE].concat());
        assert_eq!(reply.complete(), COMPLETE);
        let notice: &[u8] = b"N\0\0\0\x05\0";
        let suspended: &[u8] = b"s\0\0\0\x04";
        let refused: [&[&[u8]]; 11] = [
            &[],
            &[DESCRIPTION],
            &[ROW, COMPLETE],
            &[DESCRIPTION, ROW],
            &[DESCRIPTION, ROW, suspended],
            &[DESCRIPTION, notice, COMPLETE],
            &[DESCRIPTION, COMPLETE, notice],
            &[DESCRIPTION, COMPLETE, COMPLETE],
            &[DESCRIPTION, DESCRIPTION, COMPLETE],
            &[DESCRIPTION, &ROW[..5], COMPLETE],
            &[DESCRIPTION, COMPLETE, b"C"],
        ];
        for parts in refused {
            assert_eq!(Reply::new(frames(parts)), None, "{parts:?}");
        }
        assert_eq!(Reply::new(Bytes::from_static(b"T\0\0\0\x03\0\0C\0\0\0\x04")), None, "a length below its own size");
        assert_eq!(Reply::new(Bytes::from_static(b"T\xff\xff\xff\xff")), None);
    }

    #[test]
    fn entries_survive_the_store() {
        let entry = entry("SELECT 1");
        let bytes = entry.encode(&STAMPS).expect("fits");
        assert_eq!(Entry::decode(bytes.into(), 1 << 20), Ok(entry));
    }

    #[test]
    fn an_entry_of_another_process_is_taken_by_its_stamps() {
        let entry = entry("SELECT 1");
        let decoded = || Entry::decode(entry.encode(&[7, 8, 9]).expect("fits").into(), 1 << 20).expect("sound");
        let here =
            |words: [u16; 3]| Observation::settled(WordSet::from_indexes(words), [1, 2, 3]).expect("three words");
        let seen = here([7, 1, 900]);
        assert_eq!(decoded().adopt(&seen, &[7, 8, 9]), Some(Entry { seen: seen.clone(), ..entry.clone() }));
        assert_eq!(decoded().adopt(&seen, &[7, 8, 10]), None);
        assert_eq!(decoded().adopt(&here([7, 1, 901]), &[7, 8, 9]), None);
        assert_eq!(entry.encode(&[7, 8]), None);
    }

    #[test]
    fn what_is_not_an_entry_is_refused_with_a_reason() {
        let bytes = entry("SELECT 1").encode(&STAMPS).expect("fits");
        let decode = |bytes: &[u8]| Entry::decode(Bytes::copy_from_slice(bytes), 1 << 20);
        assert_eq!(Entry::decode(bytes.clone().into(), bytes.len() - 1), Err(BadEntry::TooLong));
        assert_eq!(decode(b""), Err(BadEntry::Length));
        assert_eq!(decode(b"wrc\x02rest"), Err(BadEntry::Format));
        assert_eq!(decode(&bytes[..bytes.len() - 1]), Err(BadEntry::Checksum));
        assert_eq!(decode(&[&bytes[..], b"x"].concat()), Err(BadEntry::Checksum));
        for position in 0..bytes.len() {
            let mut garbled = bytes.clone();
            garbled[position] ^= 1;
            assert!(decode(&garbled).is_err(), "byte {position}");
        }
    }

    /// With the checksum put right, so that what lies behind it is reached.
    fn sealed(mut bytes: Vec<u8>) -> Bytes {
        let (head, body) = bytes.split_at_mut(MAGIC.len() + CHECKSUM_BYTES);
        head[MAGIC.len()..].copy_from_slice(&hash_bytes_extended(body, CHECKSUM_SEED).to_be_bytes());
        bytes.into()
    }

    #[test]
    fn lengths_are_checked_even_under_a_good_checksum() {
        let bytes = entry("SELECT 1").encode(&STAMPS).expect("fits");
        assert_eq!(Entry::decode(sealed([&bytes[..], b"x"].concat()), 1 << 20), Err(BadEntry::Length));
        let words_at = 4 + 8 + 2 + 8 + 8;
        let mut many = bytes.clone();
        many[words_at..words_at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(Entry::decode(sealed(many), 1 << 20), Err(BadEntry::Length));
        let mut twice = bytes.clone();
        let (first, second) = (words_at + 4, words_at + 14);
        twice.copy_within(first..first + 2, second);
        assert_eq!(Entry::decode(sealed(twice), 1 << 20), Err(BadEntry::Length));
        // Two words swapped with their versions left in place must not pair up wrongly.
        let mut swapped = bytes;
        let index: [u8; 2] = [swapped[first], swapped[first + 1]];
        swapped.copy_within(second..second + 2, first);
        swapped[second..second + 2].copy_from_slice(&index);
        assert_eq!(Entry::decode(sealed(swapped), 1 << 20), Err(BadEntry::Length));
    }

    proptest! {
        #[test]
        fn decoding_is_total(body in proptest::collection::vec(any::<u8>(), 0..200), seal in any::<bool>()) {
            let bytes = [&MAGIC[..], &[0; CHECKSUM_BYTES], &body].concat();
            let bytes = if seal { sealed(bytes) } else { bytes.into() };
            let _ = Entry::decode(bytes, 1 << 20);
        }

        #[test]
        fn mutations_of_an_entry_never_panic(at in 0_usize..120, byte in any::<u8>(), cut in 0_usize..160) {
            let mut bytes = entry("SELECT 1").encode(&STAMPS).expect("fits");
            let at = at.min(bytes.len() - 1);
            bytes[at] = byte;
            bytes.truncate(cut.max(MAGIC.len() + CHECKSUM_BYTES));
            let _ = Entry::decode(sealed(bytes), 1 << 20);
        }
    }
}
