//! Auxiliary losses of mixture-of-experts routers.

use cl_adapters::{RouterRecord, top_k};
use cl_torch::tch::{Kind, Tensor};

/// Auxiliary losses of one forward pass: differentiable f64 scalars.
pub struct RouterLosses {
    /// Load-balancing loss `N · Σₑ fₑ·Pₑ` over N experts: `fₑ` is the number of selections of expert e per token, which
    /// has no gradient, and `Pₑ` its mean probability in the softmax over all logits. The value is k if all experts are
    /// used equally.
    ///
    /// Source: Fedus et al., "Switch Transformers", arXiv:2101.03961, equations 4 to 6, as Mixtral in Transformers
    /// computes it over the k selected experts.
    pub load_balancing: Tensor,
    /// Router z-loss: the mean of `(log Σₑ exp(logitₑ))²`.
    ///
    /// Source: Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models", arXiv:2202.08906,
    /// equation 5.
    pub z_loss: Tensor,
}

/// Computes both losses over the tokens of all routers in a forward pass; `None` without routers.
///
/// All routers must have the same number of experts.
pub fn router_losses(records: &[RouterRecord]) -> Option<RouterLosses> {
    let experts = records.first()?.logits.size()[1];
    let mut tokens = 0;
    let (mut selections, mut probabilities, mut squares) = (Vec::new(), Vec::new(), Vec::new());
    for RouterRecord { logits, top_k: k, .. } in records {
        tokens += logits.size()[0];
        selections.push(top_k(logits, *k).one_hot(experts).sum_dim_intlist([0, 1].as_slice(), false, Kind::Double));
        probabilities.push(logits.softmax(-1, Kind::Float).sum_dim_intlist(0, false, Kind::Double));
        squares.push(logits.logsumexp([-1i64], false).square().sum(Kind::Double));
    }
    let mean = |sums: &[Tensor]| Tensor::stack(sums, 0).sum_dim_intlist(0, false, Kind::Double) / tokens as f64;
    let load_balancing = (mean(&selections) * mean(&probabilities)).sum(Kind::Double) * experts as f64;
    Some(RouterLosses { load_balancing, z_loss: mean(&squares) })
}
