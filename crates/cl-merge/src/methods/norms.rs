use std::ops::AddAssign;

/// Squared norms, which add up over tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpcmNorms {
    /// `‖δ‖²` of each new model.
    pub task_vectors: Vec<f64>,
    /// `‖S_T‖²`.
    pub sum: f64,
}

impl AddAssign<&OpcmNorms> for OpcmNorms {
    fn add_assign(&mut self, other: &OpcmNorms) {
        self.task_vectors.resize(other.task_vectors.len().max(self.task_vectors.len()), 0.0);
        self.task_vectors.iter_mut().zip(&other.task_vectors).for_each(|(sum, x)| *sum += x);
        self.sum += other.sum;
    }
}
