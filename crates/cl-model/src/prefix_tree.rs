//! Prefix sharing: batches of sequences in which shared prefixes are stored and computed once.
//!
//! The rows of a batch are the nodes of a trie in depth-first order: the ancestors of a row precede it, and its
//! descendants follow it directly. The matrix products of a layer treat rows independently; only attention uses the
//! tree.

/// Minimum length in tokens of a shared prefix: for shorter ones, the larger mask costs more than the saved rows.
const MIN_SHARED: usize = 16;
/// A prefix is shared only if it is at least one eighth of the longest sequence, because attention in two parts makes
/// each row about a tenth more expensive.
const MIN_PART: usize = 8;

/// A run of rows that all of its descendants share.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// The parent; `None` if the node directly follows the batch's cached past.
    pub(crate) parent: Option<usize>,
    /// First row of the node.
    pub(crate) start: usize,
    /// End of the node's own rows (exclusive).
    pub(crate) own_end: usize,
    /// End of the rows of its last descendant (exclusive).
    pub(crate) end: usize,
    /// The node's children.
    pub(crate) children: Vec<usize>,
}

/// The prefix tree of the sequences of one forward pass.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    /// Token id of each row.
    pub(crate) ids: Vec<u32>,
    /// Position of each row within its sequences.
    pub(crate) positions: Vec<i64>,
    /// Nodes in depth-first order.
    pub(crate) nodes: Vec<Node>,
    /// Nodes without a parent.
    pub(crate) roots: Vec<usize>,
    ends: Vec<usize>, // for each sequence, the node in which it ends
}

impl PrefixTree {
    /// Builds the tree of sorted sequences, without their first `past` tokens, which must be common to all of them;
    /// each sequence must be longer than that. Without `share`, every sequence has its own rows.
    pub(crate) fn new(sequences: &[&[u32]], past: usize, share: bool) -> PrefixTree {
        let mut tree = PrefixTree { ends: vec![0; sequences.len()], ..PrefixTree::default() };
        let mut from = 0;
        while from < sequences.len() {
            let alone = |to: usize| !share || shared(sequences[to - 1], sequences[to], past).is_none();
            let to = (from + 1..sequences.len()).find(|&to| alone(to)).unwrap_or(sequences.len());
            let root = tree.add(sequences, from..to, past, None);
            tree.roots.push(root);
            from = to;
        }
        tree
    }

    /// Adds a node for the tokens that the sequences in `range` share after `depth`, and descendants for their
    /// remaining tokens.
    fn add(
        &mut self,
        sequences: &[&[u32]],
        range: std::ops::Range<usize>,
        depth: usize,
        parent: Option<usize>,
    ) -> usize {
        let (first, last) = (sequences[range.start], sequences[range.end - 1]);
        let shared = common(first, last);
        let (node, start) = (self.nodes.len(), self.ids.len());
        self.ids.extend_from_slice(&first[depth..shared]);
        self.positions.extend((depth..shared).map(|p| p as i64));
        let own_end = self.ids.len();
        self.nodes.push(Node { parent, start, own_end, end: own_end, children: Vec::new() });
        // Shorter sequences come first: sequences that end in this node, then groups by their next token.
        let mut from = range.start;
        while from < range.end && sequences[from].len() == shared {
            self.ends[from] = node;
            from += 1;
        }
        while from < range.end {
            let next = sequences[from][shared];
            let to = (from..range.end).find(|&i| sequences[i][shared] != next).unwrap_or(range.end);
            let child = self.add(sequences, from..to, shared, Some(node));
            self.nodes[node].children.push(child);
            from = to;
        }
        self.nodes[node].end = self.ids.len();
        node
    }

    /// Returns the rows of a sequence's tokens after the past, in order.
    pub(crate) fn rows(&self, sequence: usize) -> Vec<i64> {
        let mut path = vec![self.ends[sequence]];
        while let Some(parent) = self.nodes[path[path.len() - 1]].parent {
            path.push(parent);
        }
        path.iter().rev().flat_map(|&n| self.nodes[n].start as i64..self.nodes[n].own_end as i64).collect()
    }
}

/// The indices of the sequences of one forward pass, and the past that they share.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Indices of the sequences, sorted by their tokens.
    pub(crate) sequences: Vec<usize>,
    /// Number of leading tokens common to all of them, whose keys and values are kept from the previous batch.
    pub(crate) past: usize,
}

/// Limits of a batch; a sequence that exceeds them forms a batch of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum number of new rows.
    pub(crate) rows: usize,
    /// Maximum number of sequences.
    pub(crate) count: usize,
    /// Maximum number of sequences times the longest length after the past, which is the size of a KV cache.
    pub(crate) places: usize,
}

/// Divides sequences into batches. The model's output for sequence i is needed from position `wanted[i]` on, so a past
/// never extends beyond that position.
///
/// The sequences are sorted, so those with a common prefix are adjacent. A prefix that continues into the next batch is
/// kept if it is at least a quarter of a batch, so that a fixed few-shot prefix is computed once. Shorter prefixes are
/// recomputed, which costs less than ending batches at prefix boundaries.
pub(crate) fn batches(sequences: &[&[u32]], wanted: &[usize], limits: Limits, share: bool) -> Vec<Batch> {
    let Limits { rows, count, places } = limits;
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by(|&a, &b| sequences[a].cmp(sequences[b]).then(a.cmp(&b)));
    let mut all: Vec<Batch> = Vec::new();
    let (mut used, mut longest) = (0, 0);
    for (place, &i) in order.iter().enumerate() {
        let before = place.checked_sub(1).filter(|_| share).map(|before| sequences[order[before]]);
        let in_common = before.map_or(0, |before| common(before, sequences[i]));
        if let Some(batch) = all.last_mut() {
            let goes_on = batch.past == 0 || (in_common >= batch.past && wanted[i] >= batch.past);
            let known = before.filter(|_| goes_on).and_then(|before| shared(before, sequences[i], batch.past));
            let new = sequences[i].len() - known.unwrap_or(batch.past).min(sequences[i].len());
            let (more, longer) =
                (batch.sequences.len() + 1, longest.max(sequences[i].len() - batch.past.min(in_common)));
            if goes_on && more <= count && used + new <= rows && more.saturating_mul(longer) <= places {
                batch.sequences.push(i);
                (used, longest) = (used + new, longer);
                continue;
            }
        }
        let past = in_common.min(wanted[i]);
        // A batch that ended because of its number of sequences is measured by the rows that it computed.
        let full = all.last().is_some_and(|batch| batch.sequences.len() == count);
        let whole = if full { rows.min(used) } else { rows };
        let past = if past * 4 >= whole.max(MIN_SHARED * 4) { past } else { 0 };
        (used, longest) = (sequences[i].len() - past, sequences[i].len() - past);
        all.push(Batch { sequences: vec![i], past });
    }
    all
}

/// Length of the common prefix of two sequences, if it is long enough beyond their common past to be shared.
fn shared(a: &[u32], b: &[u32], past: usize) -> Option<usize> {
    let (length, longest) = (common(a, b), a.len().max(b.len()));
    (length >= past + MIN_SHARED && (length - past) * MIN_PART >= longest - past).then_some(length)
}

/// Length of the common prefix of two sequences, in tokens.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(sequences: &[Vec<u32>]) -> Vec<&[u32]> {
        let mut all: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        all.sort();
        all
    }

    #[test]
    fn every_sequence_is_read_back_from_its_rows() {
        let header: Vec<u32> = (0..20).collect();
        let with = |tail: &[u32]| [&header, tail].concat();
        let sequences =
            [with(&[]), with(&[7, 8]), with(&[7, 8]), with(&[7, 9, 9]), with(&[3]), vec![0, 1, 5], vec![99]];
        let all = sorted(&sequences);
        for share in [true, false] {
            let tree = PrefixTree::new(&all, 0, share);
            for (i, sequence) in all.iter().enumerate() {
                let rows = tree.rows(i);
                let ids: Vec<u32> = rows.iter().map(|&r| tree.ids[r as usize]).collect();
                let positions: Vec<i64> = rows.iter().map(|&r| tree.positions[r as usize]).collect();
                assert_eq!(ids, *sequence);
                assert_eq!(positions, (0..sequence.len() as i64).collect::<Vec<_>>());
            }
            // With sharing, the rows are the header, [3], [7], [8], [9, 9], then the two short sequences, which share
            // too little.
            assert_eq!(tree.ids.len(), if share { 20 + 1 + 1 + 1 + 2 + 3 + 1 } else { 20 * 5 + 8 + 4 });
            assert_eq!(tree.roots.len(), if share { 3 } else { 7 });
        }
        let tree = PrefixTree::new(&all[..5], 18, true);
        // A common prefix of 16 tokens is not shared by sequences of 136 tokens, but by sequences of 24.
        let long: Vec<Vec<u32>> = (0..2).map(|i| [vec![7; 16], vec![i; 120]].concat()).collect();
        assert_eq!(PrefixTree::new(&sorted(&long), 0, true).ids.len(), 2 * 136);
        let short: Vec<&[u32]> = long.iter().map(|s| &s[..24]).collect();
        assert_eq!(PrefixTree::new(&short, 0, true).ids.len(), 16 + 2 * 8);
        assert_eq!(tree.positions.iter().min(), Some(&18));
        assert!(tree.nodes.iter().all(|n| n.start < n.own_end && n.own_end <= n.end));
    }

    #[test]
    fn batches_hold_everything_once_and_keep_long_headers() {
        let header: Vec<u32> = (0..40).collect();
        let sequences: Vec<Vec<u32>> =
            (0..30).map(|i| if i % 3 == 0 { vec![i; 12] } else { [&header[..], &[50 + i; 6]].concat() }).collect();
        let slices: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        let wanted: Vec<usize> = slices.iter().map(|s| s.len() - 1).collect();
        for rows in [1, 30, 64, 100, 1000] {
            for share in [true, false] {
                let all = batches(&slices, &wanted, Limits { rows, count: 8, places: rows * 2 }, share);
                let mut seen: Vec<usize> = all.iter().flat_map(|b| b.sequences.iter().copied()).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..30).collect::<Vec<_>>());
                for (i, batch) in all.iter().enumerate() {
                    assert!(batch.sequences.len() <= 8);
                    let longest = batch.sequences.iter().map(|&s| slices[s].len() - batch.past).max().unwrap();
                    assert!(batch.sequences.len() == 1 || batch.sequences.len() * longest <= rows * 2, "{batch:?}");
                    let of: Vec<&[u32]> = batch.sequences.iter().map(|&s| slices[s]).collect();
                    let tree = PrefixTree::new(&of, batch.past, share);
                    assert!(tree.ids.len() <= rows || of.len() == 1, "{rows} {batch:?}");
                    assert!(batch.past == 0 || (share && i > 0));
                    for s in &batch.sequences {
                        assert!(wanted[*s] >= batch.past);
                        // The past is a prefix of the last sequence of the batch before.
                        let before = i.checked_sub(1).map_or(&[][..], |b| slices[*all[b].sequences.last().unwrap()]);
                        assert!(common(before, slices[*s]) >= batch.past);
                    }
                }
                assert_eq!(all.iter().any(|b| b.past > 0), share, "{rows}");
            }
        }
    }
}
