//! What names a cached reply: everything that could change a byte of it.
//!
//! Invariant: two executions get equal keys only if all their parts are equal. The parts are written with their lengths,
//! so that no two different lists of parts share an encoding, and equality compares those bytes; the hash only finds.
//!
//! What must not enter: portal and statement names, the client's address, anything that changes no byte of a reply.

use std::hash::{BuildHasher, Hash, Hasher};

use bytes::Bytes;
use foldhash::quality::FixedState;

use crate::id::ShardId;

/// One bound parameter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Param<'a> {
    /// Type OID as the client declared or Postgres inferred it; 0 if neither is known.
    pub type_oid: u32,
    pub binary: bool,
    /// `None` is SQL NULL.
    pub value: Option<&'a [u8]>,
}

/// The parts of a key.
#[derive(Clone, Copy, Debug)]
pub struct KeyParts<'a> {
    /// Replies of different shards differ (type OIDs).
    pub shard: ShardId,
    pub database: &'a str,
    /// The role that is in force (SET ROLE included), since grants and policies hang on it.
    pub role: &'a str,
    /// Normalised text; literals that were lifted out of it come as `params`.
    pub statement: &'a str,
    pub params: &'a [Param<'a>],
    /// As in Bind: none, one for all, or one per column; 0 text, 1 binary.
    pub result_formats: &'a [i16],
    /// Every setting that shapes a result (search_path, TimeZone, DateStyle, …), in a fixed order.
    pub settings: &'a [(&'a str, &'a str)],
}

/// The parts of a key as it has them: formats are empty where all is text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadParts {
    pub shard: ShardId,
    pub database: String,
    pub role: String,
    pub statement: String,
    /// Type OID, whether it is binary, and the value, which is none for NULL.
    pub params: Vec<(u32, bool, Option<Vec<u8>>)>,
    pub result_formats: Vec<i16>,
    pub settings: Vec<(String, String)>,
}

/// A key: its exact bytes and a 128-bit hash of them. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct CacheKey {
    hash: u128,
    bytes: Bytes,
}

impl CacheKey {
    pub fn new(parts: &KeyParts<'_>) -> CacheKey {
        let mut out = Vec::with_capacity(96 + parts.statement.len() + 24 * parts.params.len());
        out.extend_from_slice(&parts.shard.0.to_be_bytes());
        put(&mut out, parts.database.as_bytes());
        put(&mut out, parts.role.as_bytes());
        put(&mut out, parts.statement.as_bytes());
        put_count(&mut out, parts.params.len());
        for param in parts.params {
            out.extend_from_slice(&param.type_oid.to_be_bytes());
            out.push(u8::from(param.binary) | u8::from(param.value.is_none()) << 1);
            put(&mut out, param.value.unwrap_or_default());
        }
        put_formats(&mut out, parts.result_formats);
        put_count(&mut out, parts.settings.len());
        for (name, value) in parts.settings {
            put(&mut out, name.as_bytes());
            put(&mut out, value.as_bytes());
        }
        Self::from_bytes(out.into())
    }

    /// A key from its exact bytes, as [`CacheKey::bytes`] gave them.
    pub fn from_bytes(bytes: Bytes) -> CacheKey {
        // Two independent seeds. Stable within a build; between builds a change only makes entries unreachable.
        let half = |seed: u64| FixedState::with_seed(seed).hash_one(&bytes[..]);
        let hash = u128::from(half(0x7765_6972)) << 64 | u128::from(half(0x63_6163_6865));
        CacheKey { hash, bytes }
    }

    /// What it was made of. `None` for bytes that no key was made of.
    pub fn read(&self) -> Option<ReadParts> {
        let mut rest = &self.bytes[..];
        let shard = ShardId(u16::from_be_bytes(take(&mut rest)?));
        let (database, role, statement) = (text(&mut rest)?, text(&mut rest)?, text(&mut rest)?);
        let mut params = Vec::new();
        for _ in 0..u64::from_be_bytes(take(&mut rest)?) {
            let type_oid = u32::from_be_bytes(take(&mut rest)?);
            let [flags] = take(&mut rest)?;
            let value = part(&mut rest)?.to_vec();
            params.push((type_oid, flags & 1 != 0, (flags & 2 == 0).then_some(value)));
        }
        let mut result_formats = Vec::new();
        for _ in 0..u64::from_be_bytes(take(&mut rest)?) {
            result_formats.push(i16::from_be_bytes(take(&mut rest)?));
        }
        let mut settings = Vec::new();
        for _ in 0..u64::from_be_bytes(take(&mut rest)?) {
            settings.push((text(&mut rest)?, text(&mut rest)?));
        }
        rest.is_empty().then_some(ReadParts { shard, database, role, statement, params, result_formats, settings })
    }

    pub fn hash128(&self) -> u128 {
        self.hash
    }

    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl PartialEq for CacheKey {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && self.bytes == other.bytes
    }
}

impl Eq for CacheKey {}

impl Hash for CacheKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash as u64);
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*taken)
}

fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let count = usize::try_from(u64::from_be_bytes(take(rest)?)).ok()?;
    let (taken, after) = rest.split_at_checked(count)?;
    *rest = after;
    Some(taken)
}

fn text(rest: &mut &[u8]) -> Option<String> {
    part(rest).and_then(|bytes| std::str::from_utf8(bytes).ok()).map(str::to_owned)
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&(count as u64).to_be_bytes());
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.extend_from_slice(bytes);
}

/// "All text" is written in one way, whichever way the client said it; other lists stay as they are, because how many
/// columns a single code stands for is not known here.
fn put_formats(out: &mut Vec<u8>, formats: &[i16]) {
    let formats = if formats.iter().all(|&format| format == 0) { &[] } else { formats };
    put_count(out, formats.len());
    for format in formats {
        out.extend_from_slice(&format.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, PartialEq, Eq, Debug)]
    struct Owned {
        shard: u16,
        texts: [String; 3],
        params: Vec<(u32, bool, Option<Vec<u8>>)>,
        formats: Vec<i16>,
        settings: Vec<(String, String)>,
    }

    fn key(owned: &Owned) -> CacheKey {
        let params: Vec<Param<'_>> = owned
            .params
            .iter()
            .map(|(type_oid, binary, value)| Param { type_oid: *type_oid, binary: *binary, value: value.as_deref() })
            .collect();
        let settings: Vec<(&str, &str)> = owned.settings.iter().map(|(name, value)| (&**name, &**value)).collect();
        CacheKey::new(&KeyParts {
            shard: ShardId(owned.shard),
            database: &owned.texts[0],
            role: &owned.texts[1],
            statement: &owned.texts[2],
            params: &params,
            result_formats: &owned.formats,
            settings: &settings,
        })
    }

    fn plain() -> Owned {
        Owned {
            shard: 1,
            texts: ["shop".into(), "app".into(), "SELECT $1".into()],
            params: vec![(23, false, Some(b"7".to_vec()))],
            formats: vec![],
            settings: vec![("timezone".into(), "UTC".into())],
        }
    }

    #[test]
    fn every_part_counts() {
        let plain = plain();
        let mut others = Vec::new();
        let mut other = |change: &dyn Fn(&mut Owned)| {
            let mut changed = plain.clone();
            change(&mut changed);
            others.push(changed);
        };
        other(&|one| one.shard = 2);
        other(&|one| one.texts[0] = "shop2".into());
        other(&|one| one.texts[1] = "admin".into());
        other(&|one| one.texts[2] = "select $1".into());
        other(&|one| one.params[0].0 = 20);
        other(&|one| one.params[0].1 = true);
        other(&|one| one.params[0].2 = None);
        other(&|one| one.params[0].2 = Some(vec![]));
        other(&|one| one.params.push((23, false, None)));
        other(&|one| one.formats = vec![1]);
        other(&|one| one.formats = vec![0, 1]);
        other(&|one| one.settings[0].1 = "Europe/Berlin".into());
        other(&|one| one.settings[0].0 = "datestyle".into());
        other(&|one| one.settings.clear());
        // Text that moves from one part to its neighbour.
        other(&|one| (one.texts[0], one.texts[1]) = ("shopa".into(), "pp".into()));
        for (index, changed) in others.iter().enumerate() {
            assert_ne!(key(changed), key(&plain), "{changed:?}");
            assert_ne!(key(changed).hash128(), key(&plain).hash128(), "{changed:?}");
            assert!(others[..index].iter().all(|one| key(one) != key(changed)), "{changed:?}");
        }
    }

    #[test]
    fn a_key_tells_its_parts() {
        let parts = key(&Owned { formats: vec![1, 0], ..plain() }).read().expect("a key");
        assert_eq!(
            (parts.shard, &*parts.database, &*parts.role, &*parts.statement),
            (ShardId(1), "shop", "app", "SELECT $1")
        );
        assert_eq!(parts.params, [(23, false, Some(b"7".to_vec()))]);
        assert_eq!((parts.result_formats, parts.settings), (vec![1, 0], vec![("timezone".into(), "UTC".into())]));
        let whole = key(&plain());
        assert!((0..whole.bytes().len()).all(|cut| CacheKey::from_bytes(whole.bytes().slice(..cut)).read().is_none()));
    }

    #[test]
    fn all_text_is_one_format_however_it_is_said() {
        let said = |formats: &[i16]| key(&Owned { formats: formats.to_vec(), ..plain() });
        assert_eq!(said(&[]), said(&[0]));
        assert_eq!(said(&[]), said(&[0, 0, 0]));
        assert_ne!(said(&[1]), said(&[1, 1]));
    }

    #[test]
    fn equal_hashes_do_not_make_equal_keys() {
        let one = CacheKey::new(&KeyParts { statement: "a", ..parts() });
        let other = CacheKey { hash: one.hash, ..CacheKey::new(&KeyParts { statement: "b", ..parts() }) };
        assert_ne!(one, other);
    }

    fn parts() -> KeyParts<'static> {
        KeyParts {
            shard: ShardId(0),
            database: "",
            role: "",
            statement: "",
            params: &[],
            result_formats: &[],
            settings: &[],
        }
    }

    fn any_owned() -> impl Strategy<Value = Owned> {
        let text = || "[ab]{0,3}";
        let value = proptest::option::of(proptest::collection::vec(0_u8..3, 0..3));
        (
            0_u16..2,
            [text(), text(), text()],
            proptest::collection::vec((0_u32..2, any::<bool>(), value), 0..3),
            proptest::collection::vec(1_i16..2, 0..2),
            proptest::collection::vec((text(), text()), 0..2),
        )
            .prop_map(|(shard, texts, params, formats, settings)| Owned {
                shard,
                texts,
                params,
                formats,
                settings,
            })
    }

    proptest! {
        #[test]
        fn keys_are_equal_exactly_if_their_parts_are(one in any_owned(), other in any_owned()) {
            prop_assert_eq!(key(&one) == key(&other), one == other);
            prop_assert_eq!(CacheKey::from_bytes(key(&one).bytes().clone()), key(&one));
        }
    }
}
