//! A stored reply, and its form outside the process.
//!
//! Invariant: [`Entry::decode`] of any bytes ends in an entry that was encoded by this format version, or in an error;
//! it never panics, and neither reads nor allocates more than the caller allows.
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
    #[error("what was compressed cannot be unpacked")]
    Compressed,
    #[error("not a reply")]
    Reply,
}

/// "wrc" and the format version. A change of anything below changes the version.
const MAGIC: [u8; 4] = *b"wrc\x02";
const CHECKSUM_BYTES: usize = 8;
const CHECKSUM_SEED: u64 = 0x7765_6972;
/// How a reply is written.
const PLAIN: u8 = 0;
/// As an LZ4 block.
const LZ4: u8 = 1;
/// A reply is kept compressed only if that spares at least one part in this many.
const SPARED_MIN: usize = 8;

/// An entry for other processes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Encoded {
    pub bytes: Vec<u8>,
    /// Bytes that compression has spared; `None`: it was not worth it.
    pub spared: Option<usize>,
}

impl Entry {
    /// Memory it takes, in bytes, for weighing.
    pub fn weight(&self) -> usize {
        size_of::<Entry>() + self.key.bytes().len() + self.reply.frames.len() + 10 * self.seen.versions().len()
    }

    /// Format: magic, checksum of the rest, shard u16, epoch u64, stored u64, word count u32, (index u16, stamp u64)*,
    /// key length u32, key, form u8, length of the plain reply u32, length of the reply in this form u32, reply. Big-endian.
    /// `stamps`: of the entry's words, in their order; versions mean nothing to other processes. Replies longer than
    /// `compress_above` bytes are compressed, if that helps. `None` for a length that does not fit its field.
    pub fn encode(&self, stamps: &[u64], compress_above: usize) -> Option<Encoded> {
        if stamps.len() != self.seen.versions().len() {
            return None;
        }
        let (key, reply) = (self.key.bytes(), &self.reply.frames);
        let packed = (reply.len() > compress_above).then(|| lz4_flex::block::compress(reply));
        let packed = packed.filter(|packed| packed.len() <= reply.len() - reply.len() / SPARED_MIN);
        let (form, body) = packed.as_deref().map_or((PLAIN, &reply[..]), |packed| (LZ4, packed));
        let mut out = Vec::with_capacity(72 + key.len() + body.len() + 10 * self.seen.versions().len());
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
        out.extend_from_slice(&u32::try_from(key.len()).ok()?.to_be_bytes());
        out.extend_from_slice(key);
        out.push(form);
        out.extend_from_slice(&u32::try_from(reply.len()).ok()?.to_be_bytes());
        out.extend_from_slice(&u32::try_from(body.len()).ok()?.to_be_bytes());
        out.extend_from_slice(body);
        let spared = packed.as_ref().map(|packed| reply.len() - packed.len());
        let (head, rest) = out.split_at_mut(MAGIC.len() + CHECKSUM_BYTES);
        head[MAGIC.len()..].copy_from_slice(&hash_bytes_extended(rest, CHECKSUM_SEED).to_be_bytes());
        Some(Encoded { bytes: out, spared })
    }

    /// Reads what [`Entry::encode`] wrote; the key and a plain reply share the input's memory. `bytes_max` bounds the input, and
    /// a reply that was compressed. What stands for versions are stamps; see [`Entry::adopt`].
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
        let reply = Reply::new(reader.reply(bytes_max)?).ok_or(BadEntry::Reply)?;
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

    fn reply(&mut self, bytes_max: usize) -> Result<Bytes, BadEntry> {
        let [form] = self.array()?;
        let plain_bytes = u32::from_be_bytes(self.array()?) as usize;
        let body = self.part()?;
        match form {
            PLAIN if body.len() == plain_bytes => Ok(body),
            PLAIN => Err(BadEntry::Length),
            // Before anything is allocated for it.
            LZ4 if plain_bytes > bytes_max => Err(BadEntry::TooLong),
            LZ4 => {
                let plain = lz4_flex::block::decompress(&body, plain_bytes).map_err(|_| BadEntry::Compressed)?;
                if plain.len() == plain_bytes { Ok(plain.into()) } else { Err(BadEntry::Compressed) }
            }
            _ => Err(BadEntry::Format),
        }
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

    /// Compressed if it is longer than a kilobyte.
    fn encoded(entry: &Entry) -> Vec<u8> {
        entry.encode(&STAMPS, 1 << 10).expect("fits").bytes
    }

    /// With rows that compress well.
    fn long_entry() -> Entry {
        let rows = ROW.repeat(1000);
        Entry { reply: Reply::new(frames(&[DESCRIPTION, &rows, COMPLETE])).expect("a reply"), ..entry("SELECT 1") }
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
        assert_eq!(Entry::decode(encoded(&entry).into(), 1 << 20), Ok(entry));
    }

    #[test]
    fn long_replies_are_compressed_if_it_helps() {
        let long = long_entry();
        let plain = long.reply.frames().len();
        let packed = long.encode(&STAMPS, 1 << 10).expect("fits");
        assert!(packed.spared.is_some_and(|spared| spared > plain / 2) && packed.bytes.len() < plain / 2);
        assert_eq!(Entry::decode(packed.bytes.clone().into(), 1 << 20), Ok(long.clone()));
        assert_eq!(
            Entry::decode(packed.bytes.into(), plain - 1),
            Err(BadEntry::TooLong),
            "its plain length is bounded"
        );
        assert_eq!(long.encode(&STAMPS, plain).expect("fits").spared, None);

        let mut state = 1_u64;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        });
        let noise: Vec<u8> = noise.take(5000).collect();
        let row = [b"D", &5004_u32.to_be_bytes()[..], &noise].concat();
        let noisy = Entry { reply: Reply::new(frames(&[DESCRIPTION, &row, COMPLETE])).expect("a reply"), ..long };
        let kept = noisy.encode(&STAMPS, 1 << 10).expect("fits");
        assert_eq!(kept.spared, None);
        assert_eq!(Entry::decode(kept.bytes.into(), 1 << 20), Ok(noisy));
    }

    #[test]
    fn compressed_replies_must_have_the_length_they_say() {
        let long = long_entry();
        let bytes = encoded(&long);
        let form_at = 4 + 8 + 2 + 8 + 8 + 4 + 30 + 4 + long.key.bytes().len();
        assert_eq!(bytes[form_at], LZ4);
        let plain = long.reply.frames().len() as u32;
        let said = |length: u32, form: u8| {
            let mut changed = bytes.clone();
            changed[form_at] = form;
            changed[form_at + 1..form_at + 5].copy_from_slice(&length.to_be_bytes());
            Entry::decode(sealed(changed), 1 << 20)
        };
        assert_eq!(said(plain, LZ4), Ok(long));
        assert_eq!(said(plain + 1, LZ4), Err(BadEntry::Compressed));
        assert_eq!(said(plain - 1, LZ4), Err(BadEntry::Compressed));
        assert_eq!(said(u32::MAX, LZ4), Err(BadEntry::TooLong), "nothing is allocated for it");
        assert_eq!(said(plain, PLAIN), Err(BadEntry::Length));
        assert_eq!(said(plain, 2), Err(BadEntry::Format));
    }

    #[test]
    fn an_entry_of_another_process_is_taken_by_its_stamps() {
        let entry = entry("SELECT 1");
        let decoded =
            || Entry::decode(entry.encode(&[7, 8, 9], 1 << 20).expect("fits").bytes.into(), 1 << 20).expect("sound");
        let here =
            |words: [u16; 3]| Observation::settled(WordSet::from_indexes(words), [1, 2, 3]).expect("three words");
        let seen = here([7, 1, 900]);
        assert_eq!(decoded().adopt(&seen, &[7, 8, 9]), Some(Entry { seen: seen.clone(), ..entry.clone() }));
        assert_eq!(decoded().adopt(&seen, &[7, 8, 10]), None);
        assert_eq!(decoded().adopt(&here([7, 1, 901]), &[7, 8, 9]), None);
        assert_eq!(entry.encode(&[7, 8], 1 << 20), None);
    }

    #[test]
    fn what_is_not_an_entry_is_refused_with_a_reason() {
        let bytes = encoded(&entry("SELECT 1"));
        let decode = |bytes: &[u8]| Entry::decode(Bytes::copy_from_slice(bytes), 1 << 20);
        assert_eq!(Entry::decode(bytes.clone().into(), bytes.len() - 1), Err(BadEntry::TooLong));
        assert_eq!(decode(b""), Err(BadEntry::Length));
        assert_eq!(decode(b"wrc\x01rest"), Err(BadEntry::Format));
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
        let bytes = encoded(&entry("SELECT 1"));
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
        fn mutations_of_an_entry_never_panic(at in 0_usize..120, byte in any::<u8>(), cut in 0_usize..180, long in any::<bool>()) {
            let mut bytes = encoded(&if long { long_entry() } else { entry("SELECT 1") });
            let at = at.min(bytes.len() - 1);
            bytes[at] = byte;
            bytes.truncate(cut.max(MAGIC.len() + CHECKSUM_BYTES));
            let _ = Entry::decode(sealed(bytes), 1 << 20);
        }
    }
}
