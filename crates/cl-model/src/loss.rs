use cl_adapters::{Linear, Mode, TokenRows};
use cl_data::Packed;
use cl_torch::tch::{self, Device, Kind, Tensor};

use crate::{Decoder, ModelError};

/// Cross-entropy loss of one micro-batch, ready for the backward pass.
pub struct SupervisedLoss {
    /// Sum of −log p over the supervised tokens, an f64 scalar.
    pub nll_sum: f64,
    /// Number of supervised tokens.
    pub tokens: usize,
    /// Tensors at which the backward pass starts, with their gradients.
    roots: Vec<(Tensor, Tensor)>,
}

impl SupervisedLoss {
    /// Adds the gradients of `scale · nll_sum` to the leaves.
    ///
    /// # Errors
    /// [`ModelError::Torch`].
    pub fn backward(self) -> Result<(), ModelError> {
        self.backward_with(&[])
    }

    /// Like [`SupervisedLoss::backward`], and also adds the gradients of `Σ weight · term`. The terms are scalars of
    /// the same graph.
    ///
    /// # Errors
    /// [`ModelError::Torch`].
    pub fn backward_with(mut self, terms: &[(&Tensor, f64)]) -> Result<(), ModelError> {
        for (term, weight) in terms.iter().filter(|(term, _)| term.requires_grad()) {
            self.roots.push((term.shallow_clone(), term.full_like(*weight)));
        }
        let roots: Vec<&Tensor> = self.roots.iter().map(|r| &r.0).collect();
        let grads: Vec<&Tensor> = self.roots.iter().map(|r| &r.1).collect();
        if !roots.is_empty() {
            cl_torch::backward(&roots, &grads)?;
        }
        Ok(())
    }
}

/// Number of rows of logits in memory at the same time: with a vocabulary of 128,000, 256 rows take 131 MB in f32.
const CHUNK: i64 = 256;
/// The same on a GPU, where every chunk reads the whole output head from memory: 1 GB.
const CHUNK_ON_GPU: i64 = 2048;

/// Computes the cross-entropy loss and its gradient at the supervised positions of `x`, the residual stream
/// `(tokens, hidden)` of `packed`.
///
/// Position t is scored against the label at t + 1 of the same sequence. Positions with the label −100 are skipped,
/// including their final norm and output head. The head runs in chunks, and the gradient of the softmax is computed in
/// closed form (`softmax − one-hot`), so that the logits of all tokens are never in memory at once, nor part of a
/// graph. The gradients are those of `scale · Σ −log p`; `mode` must be the one with which `x` was computed.
///
/// # Errors
/// [`ModelError::TokenId`], [`ModelError::Torch`].
pub fn supervised_loss(
    model: &Decoder,
    x: &Tensor,
    packed: &Packed,
    scale: f64,
    mode: Mode,
) -> Result<SupervisedLoss, ModelError> {
    let (positions, targets) = supervised(packed, model.config.vocab_size)?;
    let tokens = targets.len();
    if tokens == 0 {
        return Ok(SupervisedLoss { nll_sum: 0.0, tokens, roots: Vec::new() });
    }
    let positions = Tensor::from_slice(&positions).to_device(model.device);
    let targets = Tensor::from_slice(&targets).to_device(model.device);
    let h = model.norm.forward(&x.index_select(0, &positions));
    let mut factors = vec![Factor::new(h.shallow_clone(), model.head_weight())];
    if let Some(head) = &model.lm_head {
        factors.extend(updates(head, &h, mode));
    }
    let mut rows =
        model.head_rows().map(|rows| (Factor::new(h.shallow_clone(), rows.values.to_kind(model.compute)), rows));
    let _no_graph = tch::no_grad_guard();
    let mut nll = Tensor::zeros([], (Kind::Double, model.device));
    let chunk = if model.device == Device::Cpu { CHUNK } else { CHUNK_ON_GPU };
    for start in (0..tokens as i64).step_by(chunk as usize) {
        let len = chunk.min(tokens as i64 - start);
        let target = targets.narrow(0, start, len).unsqueeze(-1);
        let logits = factors.iter().map(|f| f.product(start, len)).reduce(|sum, part| sum + part);
        // As in PEFT, a sum of products in two dtypes is rounded to the dtype of the head.
        let mut logits = logits.expect("the head itself is one").to_kind(model.compute);
        if let Some((own, rows)) = &rows {
            logits = logits.index_copy_(-1, rows.places(), &own.product(start, len));
        }
        let logits = model.scaled(logits.to_kind(Kind::Float));
        let mut p = logits.log_softmax(-1, Kind::Float);
        nll -= p.gather(-1, &target, false).sum(Kind::Double);
        let _ = p.exp_();
        let _ = p.scatter_add_(-1, &target, &Tensor::full([len, 1], -1.0, (Kind::Float, model.device)));
        let mut d_logits = model.unscaled_gradient(p * scale, &logits).to_kind(model.compute);
        if let Some((own, rows)) = &mut rows {
            own.add_gradients(&d_logits.index_select(-1, rows.places()), start, len);
            d_logits = d_logits.index_fill_(-1, rows.places(), 0.0);
        }
        factors.iter_mut().for_each(|f| f.add_gradients(&d_logits, start, len));
    }
    let roots = factors.into_iter().chain(rows.map(|(own, _)| own)).flat_map(Factor::roots).collect();
    Ok(SupervisedLoss { nll_sum: nll.double_value(&[]), tokens, roots })
}

/// The products that adapters of the output head add to the logits, in the adapters' dtype.
fn updates(head: &Linear, h: &Tensor, mode: Mode) -> Vec<Factor> {
    let kind = head.adapter_kind.unwrap_or(h.kind());
    let mut factors = Vec::new();
    if let Some(lora) = &head.lora {
        factors.push(Factor::new(lora.project_down(h, kind, mode), lora.b.to_kind(kind)));
        // A bias is computed as one more column of B, for which every token has the same input.
        let one = Tensor::full([h.size()[0], 1], lora.scaling, (kind, h.device()));
        factors.extend(lora.bias.iter().map(|b| Factor::new(one.shallow_clone(), b.to_kind(kind).unsqueeze(-1))));
    }
    factors.extend(head.frozen.iter().map(|f| Factor::new(f.project_down(h, kind), f.b.to_kind(kind))));
    factors
}

/// One product `x·Wᵀ` that contributes to the logits; its gradients are accumulated chunk by chunk.
struct Factor {
    x: Tensor,      // (rows, width)
    weight: Tensor, // (vocab, width)
    d_x: Vec<Tensor>,
    d_weight: Option<Tensor>, // f32 from the second chunk on, rounded once at the end
}

impl Factor {
    fn new(x: Tensor, weight: Tensor) -> Factor {
        Factor { x, weight, d_x: Vec::new(), d_weight: None }
    }

    fn product(&self, start: i64, len: i64) -> Tensor {
        cl_torch::linear(&self.x.narrow(0, start, len), &self.weight, None)
    }

    fn add_gradients(&mut self, d_logits: &Tensor, start: i64, len: i64) {
        let d_logits = d_logits.to_kind(self.weight.kind());
        if self.x.requires_grad() {
            self.d_x.push(d_logits.matmul(&self.weight));
        }
        if self.weight.requires_grad() {
            let part = d_logits.tr().matmul(&self.x.narrow(0, start, len));
            self.d_weight = Some(match self.d_weight.take() {
                Some(sum) => sum.to_kind(Kind::Float).g_add_(&part),
                None => part,
            });
        }
    }

    /// Tensors at which the backward pass starts, with their gradients.
    fn roots(self) -> Vec<(Tensor, Tensor)> {
        let kind = self.weight.kind();
        let mut roots = Vec::new();
        if !self.d_x.is_empty() {
            roots.push((self.x, Tensor::cat(&self.d_x, 0)));
        }
        roots.extend(self.d_weight.map(|d| (self.weight, d.to_kind(kind))));
        roots
    }
}

/// Positions whose next token is supervised, with these tokens.
fn supervised(packed: &Packed, vocab_size: i64) -> Result<(Vec<i64>, Vec<i64>), ModelError> {
    let mut positions = Vec::new();
    let mut targets = Vec::new();
    for w in packed.cu_seqlens.windows(2) {
        for t in w[0]..w[1] - 1 {
            let label = packed.labels[t as usize + 1];
            if label == -100 {
                continue;
            }
            if !(0..vocab_size).contains(&label) {
                return Err(ModelError::TokenId { id: label, vocab_size });
            }
            positions.push(t);
            targets.push(label);
        }
    }
    Ok((positions, targets))
}

impl Decoder {
    /// The weight of the output head in the compute dtype; part of the graph if it is trained.
    fn head_weight(&self) -> Tensor {
        match &self.lm_head {
            Some(head) => head.weight.to_kind(self.compute),
            None => self.embed_tokens.weight.to_kind(self.compute),
        }
    }

    /// Rows of the output head that are trained separately.
    fn head_rows(&self) -> Option<&TokenRows> {
        self.lm_head.as_ref().map_or(&self.embed_tokens.rows, |h| &h.rows).as_ref()
    }
}
