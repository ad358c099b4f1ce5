use crate::Encoded;

/// A packed micro-batch: concatenated examples without padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Token ids, of shape `(tokens)`.
    pub input_ids: Vec<i64>,
    /// Positions, of shape `(tokens)`, starting at 0 in each example.
    pub position_ids: Vec<i64>,
    /// Labels, of shape `(tokens)`; −100 where the loss does not apply, and at the first token of each example, which
    /// has no context.
    pub labels: Vec<i64>,
    /// Boundaries of the examples, starting with 0 and ending with `tokens`.
    pub cu_seqlens: Vec<i64>,
}

/// Packs examples like Transformers' `DataCollatorWithFlattening`.
///
/// ```
/// use cl_data::{Encoded, pack};
/// let a = Encoded::new(vec![5, 6, 7], 2);
/// let b = Encoded::new(vec![8, 9], 0);
/// let packed = pack(&[&a, &b]);
/// assert_eq!(packed.input_ids, [5, 6, 7, 8, 9]);
/// assert_eq!(packed.position_ids, [0, 1, 2, 0, 1]);
/// assert_eq!(packed.labels, [-100, -100, 7, -100, 9]);
/// assert_eq!(packed.cu_seqlens, [0, 3, 5]);
/// ```
pub fn pack(examples: &[&Encoded]) -> Packed {
    let mut packed = Packed { cu_seqlens: vec![0], ..Packed::default() };
    for example in examples.iter().filter(|e| !e.input_ids.is_empty()) {
        let start = packed.labels.len();
        packed.input_ids.extend(example.input_ids.iter().map(|&id| i64::from(id)));
        packed.position_ids.extend(0..example.input_ids.len() as i64);
        packed.labels.extend(example.labels());
        packed.labels[start] = -100;
        packed.cu_seqlens.push(packed.input_ids.len() as i64);
    }
    packed
}
