use cl_data::Packed;
use cl_torch::tch::{self, Kind, Tensor};

use crate::{Decoder, ModelError};

/// Cross-entropy of one micro-batch, ready for the backward pass.
pub struct SupervisedLoss {
    /// Sum of −log p over the supervised tokens, an f64 scalar.
    pub nll_sum: f64,
    /// How many tokens were supervised.
    pub tokens: usize,
    /// Where the backward pass starts, and with which gradients.
    roots: Vec<(Tensor, Tensor)>,
}

impl SupervisedLoss {
    /// Adds the gradients of `scale · nll_sum` to every leaf.
    ///
    /// # Errors
    /// [`ModelError::Torch`].
    pub fn backward(self) -> Result<(), ModelError> {
        let roots: Vec<&Tensor> = self.roots.iter().map(|r| &r.0).collect();
        let grads: Vec<&Tensor> = self.roots.iter().map(|r| &r.1).collect();
        if !roots.is_empty() {
            cl_torch::backward(&roots, &grads)?;
        }
        Ok(())
    }
}

/// Rows of logits that exist at one time: 256 rows of a vocabulary of 128,000 are 131 MB in f32.
const CHUNK: i64 = 256;

/// Loss and its gradient at the supervised positions of `x`, the residual stream `(tokens, hidden)` of `packed`.
///
/// Position t is scored against the label at t + 1 of the same sequence; labels of −100 are left out, and with them the
/// final norm and the output head at those positions. The head runs in chunks, and the gradient of the softmax is
/// written in closed form (`softmax − one-hot`), so the vocabulary-sized tensor never exists whole nor in a graph.
/// The gradients are those of `scale · Σ −log p`.
///
/// # Errors
/// [`ModelError::TokenId`], [`ModelError::Torch`].
pub fn supervised_loss(model: &Decoder, x: &Tensor, packed: &Packed, scale: f64) -> Result<SupervisedLoss, ModelError> {
    let (positions, targets) = supervised(packed, model.config.vocab_size)?;
    let tokens = targets.len();
    if tokens == 0 {
        return Ok(SupervisedLoss { nll_sum: 0.0, tokens, roots: Vec::new() });
    }
    let positions = Tensor::from_slice(&positions).to_device(model.device);
    let targets = Tensor::from_slice(&targets).to_device(model.device);
    let h = model.norm.forward(&x.index_select(0, &positions));
    let head = model.head_weight();
    let learns = head.requires_grad();
    let _no_graph = tch::no_grad_guard();
    let mut nll = Tensor::zeros([], (Kind::Double, model.device));
    let mut dh = Vec::new();
    let mut d_head: Option<Tensor> = None;
    for start in (0..tokens as i64).step_by(CHUNK as usize) {
        let len = CHUNK.min(tokens as i64 - start);
        let h = h.detach().narrow(0, start, len);
        let target = targets.narrow(0, start, len).unsqueeze(-1);
        let logits = h.linear::<&Tensor>(&head, model.head_bias().as_ref()).to_kind(Kind::Float);
        let mut p = logits.log_softmax(-1, Kind::Float);
        nll = nll - p.gather(-1, &target, false).sum(Kind::Double);
        let _ = p.exp_();
        let _ = p.scatter_add_(-1, &target, &Tensor::full([len, 1], -1.0, (Kind::Float, model.device)));
        let d_logits = (p * scale).to_kind(h.kind());
        dh.push(d_logits.matmul(&head));
        if learns {
            let part = d_logits.tr().matmul(&h);
            d_head = Some(d_head.map_or_else(|| part.shallow_clone(), |sum| sum + &part));
        }
    }
    let mut roots = Vec::new();
    if h.requires_grad() {
        roots.push((h, Tensor::cat(&dh, 0)));
    }
    roots.extend(d_head.map(|d| (head, d)));
    Ok(SupervisedLoss { nll_sum: nll.double_value(&[]), tokens, roots })
}

/// Positions whose next token is supervised, and those tokens.
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
    /// The output head in the compute dtype; part of the graph when it learns.
    fn head_weight(&self) -> Tensor {
        self.lm_head.as_ref().map_or(&self.embed_tokens, |h| &h.weight).to_kind(self.compute)
    }

    fn head_bias(&self) -> Option<Tensor> {
        self.lm_head.as_ref()?.bias.as_ref().map(|b| b.to_kind(self.compute))
    }
}
