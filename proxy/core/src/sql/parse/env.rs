//! Which columns are equal, and to what values, wherever a row of a query block matters.
//!
//! A block starts from a copy of what holds outside it, so facts flow inwards only: what a sub-query demands says
//! nothing about the rows outside.

use crate::sql::facts::KeySet;

/// A column of one range-table entry; numbered by the analyser.
pub type NodeId = usize;

/// Equality classes (union-find) and the key sets known for them.
#[derive(Clone, Default, Debug)]
pub struct Env {
    parent: Vec<NodeId>,
    keys: Vec<(NodeId, KeySet)>,
}

impl Env {
    fn root(&self, node: NodeId) -> NodeId {
        let mut node = node;
        while let Some(&parent) = self.parent.get(node) {
            if parent == node {
                break;
            }
            node = parent;
        }
        node
    }

    pub fn union(&mut self, left: NodeId, right: NodeId) {
        let (left, right) = (self.root(left), self.root(right));
        let high = left.max(right);
        while self.parent.len() <= high {
            self.parent.push(self.parent.len());
        }
        self.parent[high] = left.min(right);
    }

    pub fn same(&self, left: NodeId, right: NodeId) -> bool {
        self.root(left) == self.root(right)
    }

    /// `node` is one of `keys` in every row that matters.
    pub fn restrict(&mut self, node: NodeId, keys: KeySet) {
        self.keys.push((node, keys));
    }

    /// The narrowest-looking of the key sets known for `node`: one value before a list, a shorter list before a longer.
    pub fn keys_of(&self, node: NodeId) -> Option<&KeySet> {
        self.keys
            .iter()
            .filter(|(other, _)| self.same(node, *other))
            .map(|(_, keys)| keys)
            .min_by_key(|keys| (!keys.is_single(), keys.terms.len()))
    }

    /// All of `candidates` that equal `node`.
    pub fn equals<'a>(&'a self, node: NodeId, count: usize) -> impl Iterator<Item = NodeId> + 'a {
        (0..count).filter(move |&other| other != node && self.same(node, other))
    }
}
