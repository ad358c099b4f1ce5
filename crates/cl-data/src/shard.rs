use crate::RowRef;

/// Returns the rows of one of several processes, sharded as in accelerate: micro-batches are assigned in turn, starting
/// with process 0.
///
/// All processes get the same number of rows: the last micro-batches are filled up with rows from the beginning, so up
/// to `world · micro_batch_size − 1` rows occur twice in an epoch. Map-style and iterable data sets are sharded in the
/// same way (`BatchSamplerShard` with `even_batches`, and `IterableDatasetShard`, accelerate 1.0.1). With one process,
/// nothing is filled up.
///
/// ```
/// use cl_data::{RowRef, shard};
///
/// let rows: Vec<RowRef> = (0..5).map(|row| RowRef { dataset: 0, row }).collect();
/// let second: Vec<usize> = shard(&rows, 1, 2, 2).iter().map(|r| r.row).collect();
/// assert_eq!(second, [2, 3, 1, 2]); // rows 4 and 0 are the last micro-batch of process 0
/// ```
///
/// # Panics
/// Panics if `rank` is not below `world`, or `micro_batch_size` is 0.
pub fn shard(rows: &[RowRef], rank: usize, world: usize, micro_batch_size: usize) -> Vec<RowRef> {
    assert!(rank < world && micro_batch_size > 0, "rank {rank} of {world}, micro-batches of {micro_batch_size}");
    if world == 1 {
        return rows.to_vec();
    }
    let round = world * micro_batch_size;
    // The rows, followed by the first rows as often as needed.
    let first = &rows[..round.min(rows.len())];
    let all = rows.len().div_ceil(round) * round;
    let filled = rows.iter().chain(first.iter().cycle()).take(all);
    filled.enumerate().filter(|(i, _)| i / micro_batch_size % world == rank).map(|(_, row)| *row).collect()
}
