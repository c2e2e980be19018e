//! Postgres's extended hash, so that a shard can compute a slot in SQL and weir in Rust.
//!
//! Source of the behaviour: src/common/hashfn.c (Bob Jenkins' lookup3) and src/backend/access/hash/hashfunc.c, as a
//! little-endian server computes it.

/// `hash_bytes_extended(k, len, seed)`.
pub fn hash_bytes_extended(bytes: &[u8], seed: u64) -> u64 {
    let mut state = State::new(bytes.len() as u32, seed);
    let mut blocks = bytes.chunks_exact(12);
    for block in &mut blocks {
        state.a = state.a.wrapping_add(word(&block[0..4]));
        state.b = state.b.wrapping_add(word(&block[4..8]));
        state.c = state.c.wrapping_add(word(&block[8..12]));
        state.mix();
    }
    for (index, &byte) in blocks.remainder().iter().enumerate() {
        let byte = u32::from(byte);
        match index {
            0..=3 => state.a = state.a.wrapping_add(byte << (8 * index)),
            4..=7 => state.b = state.b.wrapping_add(byte << (8 * (index - 4))),
            // The lowest byte of c is reserved for the length, hence the shift by one more byte.
            _ => state.c = state.c.wrapping_add(byte << (8 * (index - 7))),
        }
    }
    state.finish()
}

/// `hashint8extended(value, seed)`; equal to the int4 and int2 hash of the same number.
pub fn hash_int8_extended(value: i64, seed: u64) -> u64 {
    let low = value as u32;
    let high = ((value as u64) >> 32) as u32;
    let folded = low ^ if value >= 0 { high } else { !high };
    let mut state = State::new(4, seed);
    state.a = state.a.wrapping_add(folded);
    state.finish()
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))
}

struct State {
    a: u32,
    b: u32,
    c: u32,
}

impl State {
    fn new(length: u32, seed: u64) -> Self {
        let start = 0x9e37_79b9_u32.wrapping_add(length).wrapping_add(3_923_095);
        let mut state = State { a: start, b: start, c: start };
        if seed != 0 {
            state.a = state.a.wrapping_add((seed >> 32) as u32);
            state.b = state.b.wrapping_add(seed as u32);
            state.mix();
        }
        state
    }

    fn mix(&mut self) {
        let State { a, b, c } = self;
        mix_step(a, c, 4, *b);
        mix_step(b, a, 6, *c);
        mix_step(c, b, 8, *a);
        mix_step(a, c, 16, *b);
        mix_step(b, a, 19, *c);
        mix_step(c, b, 4, *a);
    }

    fn finish(mut self) -> u64 {
        let State { a, b, c } = &mut self;
        final_step(c, *b, 14);
        final_step(a, *c, 11);
        final_step(b, *a, 25);
        final_step(c, *b, 16);
        final_step(a, *c, 4);
        final_step(b, *a, 14);
        final_step(c, *b, 24);
        u64::from(self.b) << 32 | u64::from(self.c)
    }
}

/// `x -= y; x ^= rot(y, bits); y += z`
fn mix_step(x: &mut u32, y: &mut u32, bits: u32, z: u32) {
    *x = x.wrapping_sub(*y) ^ y.rotate_left(bits);
    *y = y.wrapping_add(z);
}

/// `x ^= y; x -= rot(y, bits)`
fn final_step(x: &mut u32, y: u32, bits: u32) {
    *x = (*x ^ y).wrapping_sub(y.rotate_left(bits));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Slot;

    #[test]
    fn integers_hash_as_postgres_does() {
        let vectors: [(i64, i64, usize); 10] = [
            (0, 4154612158245552303, 922),
            (1, -3670598878359251130, 3280),
            (2, 3647684041653542134, 809),
            (42, 8010225493015854792, 1778),
            (-1, -1888257769727981238, 3676),
            (2147483647, -9109110466470504941, 2073),
            (-2147483648, 1977219185673256887, 439),
            (4294967296, -3670598878359251130, 3280),
            (i64::MAX, 1977219185673256887, 439),
            (i64::MIN, -9109110466470504941, 2073),
        ];
        for (value, hash, slot) in vectors {
            assert_eq!(hash_int8_extended(value, 0) as i64, hash, "{value}");
            assert_eq!(Slot::of_hash(hash as u64).index(), slot, "{value}");
        }
    }

    #[test]
    fn text_hashes_as_postgres_does() {
        let hundred = "x".repeat(100);
        let vectors: [(&str, i64, usize); 10] = [
            ("", -6939563903564495251, 2555),
            ("a", 3591986179850072241, 797),
            ("abc", -6747756470228489321, 2597),
            ("user_42", -914930904263658585, 3892),
            ("hello world!", -2866487628948787489, 3459),
            ("héllo", 2465157995015290115, 547),
            ("漢字", 5510981731381295353, 1223),
            ("🙂", -160011369191771018, 4060),
            ("The quick brown fox jumps over the lazy dog", 2182139051089226439, 484),
            (&hundred, -6927006773748011226, 2557),
        ];
        for (text, hash, slot) in vectors {
            assert_eq!(hash_bytes_extended(text.as_bytes(), 0) as i64, hash, "{text}");
            assert_eq!(Slot::of_hash(hash as u64).index(), slot, "{text}");
        }
    }

    #[test]
    fn uuids_hash_as_postgres_does() {
        let vectors: [(u128, i64); 5] = [
            (0, -6859010066814654381),
            (1, 3419970005924668665),
            (u128::MAX, 293445543803463785),
            (0x123e4567e89b12d3a456426614174000, -1647950126005018481),
            (0xdeadbeef000040008000000000000000, 8640723249179564604),
        ];
        for (value, hash) in vectors {
            assert_eq!(hash_bytes_extended(&value.to_be_bytes(), 0) as i64, hash, "{value:x}");
        }
    }
}
