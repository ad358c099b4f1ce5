//! Mixture of low-rank updates of one linear layer, weighted for each token by a router.

use cl_moe::{Mixture, RouterLogits, RouterNorm, mixture_tensors};
use cl_torch::load_tensor;
use cl_torch::tch::{Device, Kind, Tensor};

use crate::{AdapterError, Linear, Mode, RouterRecorder, top_k};

/// Low-rank experts of one linear layer:
///
/// ```text
/// y = W₀x + Σ_{e ∈ top-k} gₑ(x) · sₑ·Bₑ·Aₑ·x
/// ```
///
/// Experts are selected by their logits, with ties going to the lowest index. Gates are the normalized selected logits,
/// in f32. All experts are computed together: the product with the stacked A is multiplied by each expert's gate and
/// scaling, and then by the stacked B. Experts that are not selected have a gate of 0; this is cheaper than gathering
/// the tokens of each expert.
///
/// Source: Lee et al., "Flexible and Effective Mixing of Large Language Models into a Mixture of Domain Experts",
/// arXiv:2408.17280, for trained or random routers; the sources of routers computed from the adapters are at
/// [`RouterLogits`].
pub struct LoraMixture {
    /// `[Σr, in]`, f32.
    pub a: Tensor,
    /// `[out, Σr]`, f32.
    pub b: Tensor,
    /// `[experts, in]`, f32; `None` if the logits are norms of updates. The only trainable tensor of the mixture.
    pub router: Option<Tensor>,
    /// Records the router's decisions, if set.
    pub recorder: Option<RouterRecorder>,
    /// `[Σr, experts]`, f32: an expert's scaling in the rows of its rank, 0 elsewhere. Expands gates to ranks.
    scalings: Tensor,
    logits: RouterLogits,
    norm: RouterNorm,
    top_k: i64,
}

/// Lower bound of squared norms, which keeps the gradient of a norm of 0 finite.
const SMALLEST_SQUARE: f64 = 1e-30;

impl LoraMixture {
    /// Loads the experts of `layer` from a mixture's directory.
    ///
    /// # Errors
    /// Returns [`AdapterError::UnknownModule`] if the mixture has no experts for the layer, [`AdapterError::Shape`] if
    /// they do not fit it, and an error if reading fails.
    pub fn load(layer: &Linear, mixture: &Mixture) -> Result<LoraMixture, AdapterError> {
        let (path, module) = (mixture.dir().to_owned(), layer.name.clone());
        let (Some(experts), Some((input, output))) = (mixture.config().modules.get(&module), mixture.widths(&module))
        else {
            return Err(AdapterError::UnknownModule { path, module });
        };
        if layer.widths() != (input as i64, output as i64) {
            let ((own_input, own_output), rank) = (layer.widths(), experts.total_rank());
            let (a, b) = (vec![rank, input], vec![output, rank]);
            return Err(AdapterError::Shape { path, module, input: own_input, output: own_output, a, b });
        }
        let device = layer.weight.device();
        let load = |name: &str| load_tensor(mixture, name, Kind::Float, device);
        let [a, b, router] = mixture_tensors(&module);
        let config = mixture.config();
        let router = match config.router_logits {
            RouterLogits::UpdateNorm => None,
            _ => Some(load(&router)?.set_requires_grad(true)),
        };
        Ok(LoraMixture {
            a: load(&a)?,
            b: load(&b)?,
            router,
            recorder: None,
            scalings: scalings(&experts.ranks, &experts.scalings, device),
            logits: config.router_logits,
            norm: config.router_norm,
            top_k: config.num_experts_per_tok as i64,
        })
    }

    /// Returns `y + Σₑ gₑ·sₑ·Bₑ·Aₑ·x`, computed in the dtype of `y` `[tokens, out]`, whose memory it reuses; `x` is
    /// `[tokens, in]`.
    pub(crate) fn add_to(&self, mut y: Tensor, x: &Tensor, mode: Mode) -> Tensor {
        let kind = y.kind();
        let projected = mode.linear(&x.to_kind(kind), &self.a.to_kind(kind), None);
        let logits = self.logits(x, &projected, mode);
        let gates = self.gates(&logits);
        if let Some(recorder) = &self.recorder {
            recorder.record(&logits, self.top_k, || gates.shallow_clone());
        }
        let spread = mode.linear(&gates, &self.scalings, None).to_kind(kind);
        y.addmm_(&(projected * spread), &self.b.to_kind(kind).tr())
    }

    /// Computes the logits, `[tokens, experts]`, f32.
    fn logits(&self, x: &Tensor, projected: &Tensor, mode: Mode) -> Tensor {
        let routed = |router: &Tensor| mode.linear(&x.to_kind(Kind::Float), router, None);
        match (self.logits, &self.router) {
            (RouterLogits::Linear, Some(router)) => routed(router),
            (RouterLogits::Absolute, Some(router)) => routed(router).abs(),
            _ => {
                let squares = projected.to_kind(Kind::Float).square();
                squares.matmul(&self.scalings.square()).clamp_min(SMALLEST_SQUARE).sqrt()
            }
        }
    }

    /// Computes the gates, `[tokens, experts]`, f32; 0 for experts that are not selected.
    fn gates(&self, logits: &Tensor) -> Tensor {
        if self.top_k == logits.size()[1] {
            return self.normed(logits);
        }
        let chosen = top_k(logits, self.top_k);
        let gates = self.normed(&logits.gather(-1, &chosen, false));
        logits.zeros_like().scatter(-1, &chosen, &gates)
    }

    fn normed(&self, selected: &Tensor) -> Tensor {
        match self.norm {
            RouterNorm::Sigmoid => selected.sigmoid(),
            RouterNorm::Softmax => selected.softmax(-1, Kind::Float),
            RouterNorm::Sum => selected / (selected.sum_dim_intlist(-1, true, Kind::Float) + 1e-6),
        }
    }

    /// Returns a second handle to the same tensors.
    pub fn shallow_clone(&self) -> LoraMixture {
        LoraMixture {
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
            router: self.router.as_ref().map(Tensor::shallow_clone),
            recorder: self.recorder.clone(),
            scalings: self.scalings.shallow_clone(),
            ..*self
        }
    }
}

fn scalings(ranks: &[usize], scalings: &[f64], device: Device) -> Tensor {
    let experts = ranks.len();
    let mut rows = Vec::new();
    for (e, (&rank, &scaling)) in ranks.iter().zip(scalings).enumerate() {
        let mut row = vec![0f32; experts];
        row[e] = scaling as f32;
        (0..rank).for_each(|_| rows.extend_from_slice(&row));
    }
    Tensor::from_slice(&rows).reshape([-1, experts as i64]).to_device(device)
}
