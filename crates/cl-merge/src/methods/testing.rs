use super::method::{MergeMethod, merge_tensor};
use crate::Error;
use crate::tensor::{TensorGroup, Values};

/// Merges values in memory, and asserts that one thread and several threads give the same bits.
pub(super) fn merged(
    method: &dyn MergeMethod,
    shape: &[usize],
    base: Option<&[f32]>,
    models: &[&[f32]],
) -> Result<Vec<f32>, Error> {
    let base = base.map(|x| Values::from_slice("base", x));
    let models: Vec<_> = models.iter().map(|x| Values::from_slice("model", x)).collect();
    let mut group = TensorGroup::new("w", shape, base, models);
    let serial = merge_tensor(method, &group)?;
    group.parallel = true;
    assert_eq!(serial, merge_tensor(method, &group)?);
    Ok(serial)
}
