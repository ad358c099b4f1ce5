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
    /// Whether pieces must contain whole rows (of the last dimension).
    fn whole_rows(&self) -> bool {
        false
    }

    /// Whether [`MergePieces::merge`] takes task vectors (differences of the models from the base) instead of weights.
    /// Such a method has a base.
    fn task_vectors(&self) -> bool {
        false
    }

    /// Whether merging a single input returns it unchanged, so that its bytes can be copied.
    fn copies(&self) -> bool {
        false
    }

    /// Whether the method reads the whole tensor before it merges the pieces, and does both in pieces that need not be
    /// whole rows.
    fn reads_twice(&self, _group: &TensorGroup<'_>) -> bool {
        false
    }

    /// Workspace memory for a tensor in bytes, in addition to pieces: an upper estimate, made without reading the
    /// tensor.
    fn workspace(&self, _group: &TensorGroup<'_>) -> usize {
        0
    }

    /// Estimated work for a tensor, in arbitrary units; only ratios between tensors matter.
    fn cost(&self, group: &TensorGroup<'_>) -> f64 {
        (group.elements() * (group.models.len() + 1)) as f64
    }

    /// The contribution of this tensor to norms over the whole model, for methods that scale by them; `None` for
    /// others. With `keep`, the method can also return results that the merge would have to recompute;
    /// they take [`MergeMethod::kept`] bytes.
    ///
    /// # Errors
    /// Returns an error if reading fails.
    fn measure(&self, _group: &TensorGroup<'_>, _keep: bool) -> Result<Option<Measured>, Error> {
        Ok(None)
    }

    /// Size in bytes of the results that [`MergeMethod::measure`] keeps for a tensor.
    fn kept(&self, _group: &TensorGroup<'_>) -> usize {
        0
    }

    /// The method with norms over the whole model and the results kept for a tensor; `None` if it does not use them.
    fn with_norms(&self, _norms: &OpcmNorms, _kept: Option<Vec<f32>>) -> Option<Box<dyn MergeMethod>> {
        None
    }

    /// Prepares the merge of a tensor, for which it can read the whole tensor, and returns the merge of its pieces.
    ///
    /// # Errors
    /// Returns an error if reading fails, or [`Error::Undefined`] if the method is not defined for these values.
    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error>;
}

/// Maximum size in bytes of a tensor that is kept in memory between two passes over it. Larger tensors are read again.
const MOST_HELD: usize = 32 << 20;

/// Number of bytes of a tensor to keep in memory between two passes over it: all or none.
pub(crate) fn held_bytes(method: &dyn MergeMethod, group: &TensorGroup<'_>) -> usize {
    let bytes = group.bytes();
    if bytes <= MOST_HELD && method.reads_twice(group) { bytes } else { 0 }
}

/// Result of [`MergeMethod::measure`] for a tensor.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Contribution of the tensor to the norms over the model.
    pub norms: OpcmNorms,
    /// Results that the merge does not have to recompute.
    pub kept: Option<Vec<f32>>,
}

/// Merges the pieces of one tensor, in any order and from any thread.
pub trait MergePieces: Sync {
    /// Writes the merged values of a piece to `out`, which is as long as the piece. The piece may be overwritten.
    fn merge(&self, piece: &mut Piece, out: &mut [f32]);

    /// State from which a later merge can continue, as in [`crate::methods::Opcm`].
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

/// Merges all pieces of a tensor. `each` accumulates the values of the pieces that are read together; `end` receives
/// the index of their first element and the accumulated values. Returns the results of `end` in order, and the method's
/// state.
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

/// The error of a method that is not defined for a tensor.
pub(super) fn undefined(group: &TensorGroup<'_>, method: &'static str, kind: Undefined) -> Error {
    Error::Undefined { tensor: group.name.to_owned(), method, kind }
}

/// Checks that a setting has one value per model.
pub(super) fn one_per_model<T>(
    group: &TensorGroup<'_>,
    method: &'static str,
    setting: &'static str,
    values: &[T],
) -> Result<(), Error> {
    let (found, models) = (values.len(), group.models.len());
    if found == models {
        Ok(())
    } else {
        Err(undefined(group, method, Undefined::NotOnePerModel { setting, found, models }))
    }
}
