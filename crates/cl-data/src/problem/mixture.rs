/// What is wrong with the settings of a [`Mixture`](crate::Mixture).
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MixtureProblem {
    /// The fraction of replayed rows is out of range.
    #[error("replay.fraction = {fraction}: expected a positive number, at most 100, such as 0.1")]
    Fraction {
        /// The fraction.
        fraction: f64,
    },
    /// The number of weights differs from the number of data sets.
    #[error("mixture.joint.weights: {weights} for {sets} data sets; expected one per data set, in order")]
    WeightCount {
        /// Number of weights.
        weights: usize,
        /// Number of data sets.
        sets: usize,
    },
    /// A weight is out of range, or all are 0.
    #[error("mixture.joint.weights = {weights:?}: expected numbers from 0 to 1e9, not all 0")]
    Weights {
        /// The weights.
        weights: Vec<f64>,
    },
    /// The temperature is out of range.
    #[error("mixture.joint.temperature = {temperature}: expected 0.01 to 1e9, such as 2.0")]
    Temperature {
        /// The temperature.
        temperature: f64,
    },
}
