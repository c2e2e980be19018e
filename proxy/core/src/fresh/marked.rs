//! A set of words that may be all of them: what is kept while words wait for a position.
//!
//! One bit for each, so that marking all takes no longer than a write does; nothing is allocated while none is marked.

use super::words::WORDS;

const BLOCK: usize = u64::BITS as usize;

/// Words of one shard.
#[derive(Clone, Debug, Default)]
pub struct MarkedWords {
    /// `None`: none is marked.
    bits: Option<Box<[u64]>>,
}

impl MarkedWords {
    pub fn all() -> Self {
        MarkedWords { bits: Some(vec![u64::MAX; WORDS / BLOCK].into()) }
    }

    pub fn is_empty(&self) -> bool {
        self.bits.is_none()
    }

    /// Takes what is marked in `other` over.
    pub fn merge(&mut self, other: MarkedWords) {
        match (&mut self.bits, other.bits) {
            (Some(ours), Some(theirs)) => {
                for (ours, theirs) in ours.iter_mut().zip(theirs) {
                    *ours |= theirs;
                }
            }
            (ours @ None, theirs) => *ours = theirs,
            (Some(_), None) => {}
        }
    }

    /// What is marked here and not in `other`, ascending.
    pub fn without<'a>(&'a self, other: &'a MarkedWords) -> impl Iterator<Item = u16> + 'a {
        let theirs = other.bits.as_deref();
        self.bits.iter().flat_map(|ours| ours.iter().enumerate()).flat_map(move |(block, ours)| {
            let mut left = ours & !theirs.map_or(0, |theirs| theirs[block]);
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some((block * BLOCK) as u16 + bit as u16)
            })
        })
    }
}

impl Extend<u16> for MarkedWords {
    fn extend<I: IntoIterator<Item = u16>>(&mut self, words: I) {
        for word in words {
            let bits = self.bits.get_or_insert_with(|| vec![0; WORDS / BLOCK].into());
            bits[usize::from(word) / BLOCK] |= 1 << (usize::from(word) % BLOCK);
        }
    }
}

impl FromIterator<u16> for MarkedWords {
    fn from_iter<I: IntoIterator<Item = u16>>(words: I) -> Self {
        let mut marked = MarkedWords::default();
        marked.extend(words);
        marked
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn said(marked: &MarkedWords) -> Vec<u16> {
        marked.without(&MarkedWords::default()).collect()
    }

    #[test]
    fn it_is_a_set() {
        assert!(MarkedWords::default().is_empty() && said(&MarkedWords::default()).is_empty());
        assert_eq!(said(&MarkedWords::all()).len(), WORDS);
        let sets: [BTreeSet<u16>; 4] =
            [[].into(), [0, 63, 64, 65_535].into(), [1, 63, 64, 4_000].into(), (0..=u16::MAX).collect()];
        for (ours, theirs) in sets.iter().flat_map(|ours| sets.iter().map(move |theirs| (ours, theirs))) {
            let (marked, other): (MarkedWords, MarkedWords) =
                (ours.iter().copied().collect(), theirs.iter().copied().collect());
            assert_eq!(marked.is_empty(), ours.is_empty());
            assert!(marked.without(&other).eq(ours.difference(theirs).copied()));
            let mut both = marked.clone();
            both.merge(other);
            assert!(said(&both).iter().eq(ours.union(theirs)));
        }
    }
}
