use super::opcm_state::OpcmNorms;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup, runs};

/// A merge method: computes one output tensor from one tensor of several models.
///
/// Files, threads and memory are handled by the engine. A method can first read the whole tensor
/// ([`MergeMethod::prepare`]: norms, thresholds, decompositions), and then merges it piece by piece
/// ([`MergePieces::merge`]).
pub trait MergeMethod: Send + Sync {
    /// Whether a piece has to hold whole rows (of the last dimension).
    fn whole_rows(&self) -> bool {
        false
    }

    /// Whether [`MergePieces::merge`] wants the models' values as differences from the base's. Such a method has a base.
    fn task_vectors(&self) -> bool {
        false
    }

    /// Whether the merge of a lone input is that input, so that its bytes may be copied as they are.
    fn copies(&self) -> bool {
        false
    }

    /// Whether the method reads the whole tensor before it merges its pieces, both in pieces that need not be whole rows.
    fn reads_twice(&self, _group: &TensorGroup<'_>) -> bool {
        false
    }

    /// Bytes that the method holds beside pieces for a tensor; estimated from above, without reading it.
    fn workspace(&self, _group: &TensorGroup<'_>) -> usize {
        0
    }

    /// Work for a tensor, in any unit; only ratios between tensors count.
    fn cost(&self, group: &TensorGroup<'_>) -> f64 {
        (group.elements() * (group.models.len() + 1)) as f64
    }

    /// This tensor's part of norms over the whole model, for a method that scales by these; `None` for others. With `keep`,
    /// what the merge would compute once more may be kept, in [`MergeMethod::kept`] bytes.
    ///
    /// # Errors
    /// Returns an error if reading fails.
    fn measure(&self, _group: &TensorGroup<'_>, _keep: bool) -> Result<Option<Measured>, Error> {
        Ok(None)
    }

    /// Bytes of what [`MergeMethod::measure`] keeps of a tensor.
    fn kept(&self, _group: &TensorGroup<'_>) -> usize {
        0
    }

    /// The method with norms over the whole model and what was kept of a tensor, where it has use for them.
    fn with_norms(&self, _norms: &OpcmNorms, _kept: Option<Vec<f32>>) -> Option<Box<dyn MergeMethod>> {
        None
    }

    /// Looks at the tensor and returns what merges its pieces.
    ///
    /// # Errors
    /// Returns an error if reading fails, or [`Error::Undefined`] if the method has no answer for these values.
    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error>;
}

/// Bytes of a tensor at most that are kept between two passes over it. Larger ones are read again.
const MOST_HELD: usize = 32 << 20;

/// Bytes of a tensor that are worth keeping between two passes over it.
pub(crate) fn held_bytes(method: &dyn MergeMethod, group: &TensorGroup<'_>) -> usize {
    let bytes = group.bytes();
    if bytes <= MOST_HELD && method.reads_twice(group) { bytes } else { 0 }
}

/// What [`MergeMethod::measure`] says of a tensor.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Its part of the norms over the model.
    pub norms: OpcmNorms,
    /// What the merge need not compute again.
    pub kept: Option<Vec<f32>>,
}

/// Merges the pieces of one tensor, in any order and from any thread.
pub trait MergePieces: Sync {
    /// Writes the merged values of a piece to `out`, which is as long as the piece. The piece may be overwritten.
    fn merge(&self, piece: &mut Piece, out: &mut [f32]);

    /// What a later merge needs to go on from this one, as [`crate::methods::Opcm`] does.
    fn state(&self) -> Option<serde_json::Value> {
        None
    }
}

impl<F: Fn(&mut Piece, &mut [f32]) + Sync> MergePieces for F {
    fn merge(&self, piece: &mut Piece, out: &mut [f32]) {
        self(piece, out);
    }
}

/// Merges one tensor in memory, without the engine.
///
/// ```
/// use cl_merge::{TensorGroup, Values, merge_tensor, methods::Linear};
/// let models = vec![Values::from_slice("a", &[1.0, 2.0]), Values::from_slice("b", &[3.0, 6.0])];
/// let group = TensorGroup::new("w", &[2], None, models);
/// assert_eq!(merge_tensor(&Linear { weights: vec![1.0, 1.0], normalize: true }, &group)?, [2.0, 4.0]);
/// # Ok::<(), cl_merge::Error>(())
/// ```
///
/// # Errors
/// Returns the errors of the method.
pub fn merge_tensor(method: &dyn MergeMethod, group: &TensorGroup<'_>) -> Result<Vec<f32>, Error> {
    let collect = |values: &mut Vec<f32>, _: &Piece, out: &[f32]| values.extend_from_slice(out);
    Ok(merge_runs(method, group, collect, |_, values| Ok(values))?.0.concat())
}

/// Merges all pieces of a tensor: `each` adds a piece's values to what `end` then gets for the pieces that were read together,
/// with the place of their first element. Returns the results of `end` in order, and the method's state.
pub(crate) fn merge_runs<A: Default, R: Send>(
    method: &dyn MergeMethod,
    group: &TensorGroup<'_>,
    each: impl Fn(&mut A, &Piece, &[f32]) + Sync,
    end: impl Fn(usize, A) -> Result<R, Error> + Sync,
) -> Result<(Vec<R>, Option<serde_json::Value>), Error> {
    let prepared = method.prepare(group)?;
    let results = group.map(&runs(&group.pieces(method.whole_rows())), |run| {
        let mut all = A::default();
        group.with_pieces(run, method.task_vectors(), |piece| {
            let [mut out] = piece.zeros();
            prepared.merge(piece, &mut out);
            each(&mut all, piece, &out);
            piece.give_back([out]);
        })?;
        end(run[0].start, all)
    })?;
    Ok((results, prepared.state()))
}

/// The error of a method that has no answer for a tensor.
pub(super) fn undefined(group: &TensorGroup<'_>, method: &'static str, kind: Undefined) -> Error {
    Error::Undefined { tensor: group.name.to_owned(), method, kind }
}
