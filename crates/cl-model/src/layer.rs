use cl_adapters::Linear;
use cl_torch::tch::Tensor;

use crate::attention::{Attend, Attention};
use crate::feed_forward::FeedForward;
use crate::norm::RmsNorm;
use crate::rope::Angles;
use crate::routing::{Gate, Pass};

/// One decoder layer: attention and feed-forward, each added to the residual stream.
pub(crate) struct Layer {
    pub(crate) norms: Norms,
    pub(crate) self_attn: Attention,
    pub(crate) feed_forward: FeedForward,
    pub(crate) residual_multiplier: f64,
}

/// The norms of a layer, by their names in the checkpoint. `post_attention_layernorm` is applied before the MLP in some
/// families and after attention in others.
pub(crate) enum Norms {
    Pre { input: RmsNorm, post_attention: RmsNorm },
    PreAndPost { input: RmsNorm, post_attention: RmsNorm, pre_feedforward: RmsNorm, post_feedforward: RmsNorm },
    Post { post_attention: RmsNorm, post_feedforward: RmsNorm },
}

impl Norms {
    fn all(&self) -> Vec<&RmsNorm> {
        match self {
            Norms::Pre { input, post_attention } => vec![input, post_attention],
            Norms::PreAndPost { input, post_attention, pre_feedforward, post_feedforward } => {
                vec![input, post_attention, pre_feedforward, post_feedforward]
            }
            Norms::Post { post_attention, post_feedforward } => vec![post_attention, post_feedforward],
        }
    }

    fn all_mut(&mut self) -> Vec<&mut RmsNorm> {
        match self {
            Norms::Pre { input, post_attention } => vec![input, post_attention],
            Norms::PreAndPost { input, post_attention, pre_feedforward, post_feedforward } => {
                vec![input, post_attention, pre_feedforward, post_feedforward]
            }
            Norms::Post { post_attention, post_feedforward } => vec![post_attention, post_feedforward],
        }
    }

    fn shallow_clone(&self) -> Norms {
        match self {
            Norms::Pre { input, post_attention } => {
                Norms::Pre { input: input.shallow_clone(), post_attention: post_attention.shallow_clone() }
            }
            Norms::PreAndPost { input, post_attention, pre_feedforward, post_feedforward } => Norms::PreAndPost {
                input: input.shallow_clone(),
                post_attention: post_attention.shallow_clone(),
                pre_feedforward: pre_feedforward.shallow_clone(),
                post_feedforward: post_feedforward.shallow_clone(),
            },
            Norms::Post { post_attention, post_feedforward } => Norms::Post {
                post_attention: post_attention.shallow_clone(),
                post_feedforward: post_feedforward.shallow_clone(),
            },
        }
    }
}

impl Layer {
    /// Maps `x` `(tokens, hidden)` to `(tokens, hidden)`; see [`Attention::forward`] for `attend`.
    pub(crate) fn forward(&self, x: &Tensor, angles: &Angles, pass: Pass<'_>, attend: &mut Attend<'_>) -> Tensor {
        self.forward_observed(x, angles, pass, attend, &mut |_| {})
    }

    /// Like [`Layer::forward`], but returns only the tokens with the indices `rows`.
    ///
    /// The other tokens contribute only their keys and values, because after attention no operation mixes tokens.
    /// `pass` must not contain a selection of experts, which would be for all tokens.
    pub(crate) fn forward_rows(
        &self,
        x: &Tensor,
        rows: &Tensor,
        angles: &Angles,
        pass: Pass<'_>,
        attend: &mut Attend<'_>,
    ) -> Tensor {
        let mut attend_rows = |q, k, v, rule| attend(q, k, v, rule).index_select(0, rows);
        let attention = |x: &Tensor| self.self_attn.forward(x, angles, pass, &mut attend_rows);
        self.residual(x, &x.index_select(0, rows), attention, |x| self.feed_forward.forward(x, pass))
    }

    /// Like [`Layer::forward`]; `observe` receives the input of the feed-forward block, `(tokens, hidden)`.
    pub(crate) fn forward_observed(
        &self,
        x: &Tensor,
        angles: &Angles,
        pass: Pass<'_>,
        attend: &mut Attend<'_>,
        observe: &mut dyn FnMut(&Tensor),
    ) -> Tensor {
        let attention = |x: &Tensor| self.self_attn.forward(x, angles, pass, attend);
        self.residual(x, x, attention, |x| {
            observe(x);
            self.feed_forward.forward(x, pass)
        })
    }

    /// Computes the residual stream after the layer. Attention gets all of `x`; its result is added to `kept`, the
    /// tokens of `x` for which it returns a result.
    fn residual(
        &self,
        x: &Tensor,
        kept: &Tensor,
        attention: impl FnOnce(&Tensor) -> Tensor,
        feed_forward: impl FnOnce(&Tensor) -> Tensor,
    ) -> Tensor {
        match &self.norms {
            Norms::Pre { input, post_attention } => {
                let x = kept + self.branch(attention(&input.forward(x)));
                &x + self.branch(feed_forward(&post_attention.forward(&x)))
            }
            Norms::PreAndPost { input, post_attention, pre_feedforward, post_feedforward } => {
                let x = kept + post_attention.forward(&attention(&input.forward(x)));
                &x + post_feedforward.forward(&feed_forward(&pre_feedforward.forward(&x)))
            }
            Norms::Post { post_attention, post_feedforward } => {
                let x = kept + post_attention.forward(&attention(x));
                &x + post_feedforward.forward(&feed_forward(&x))
            }
        }
    }

    fn branch(&self, y: Tensor) -> Tensor {
        if self.residual_multiplier == 1.0 { y } else { y * self.residual_multiplier }
    }

    pub(crate) fn norms(&self) -> Vec<&RmsNorm> {
        self.norms.all().into_iter().chain(self.self_attn.norms()).collect()
    }

    pub(crate) fn linears(&self) -> Vec<&Linear> {
        self.self_attn.linears().into_iter().chain(self.feed_forward.linears()).collect()
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        self.self_attn.linears_mut().into_iter().chain(self.feed_forward.linears_mut()).collect()
    }

    pub(crate) fn gates(&self) -> Vec<&Gate> {
        self.self_attn.gates().into_iter().chain(self.feed_forward.gates()).collect()
    }

    pub(crate) fn gates_mut(&mut self) -> Vec<&mut Gate> {
        self.self_attn.gates_mut().into_iter().chain(self.feed_forward.gates_mut()).collect()
    }

    pub(crate) fn norms_mut(&mut self) -> Vec<&mut RmsNorm> {
        self.norms.all_mut().into_iter().chain(self.self_attn.norms_mut()).collect()
    }

    pub(crate) fn shallow_clone(&self) -> Layer {
        Layer {
            norms: self.norms.shallow_clone(),
            self_attn: self.self_attn.shallow_clone(),
            feed_forward: self.feed_forward.shallow_clone(),
            residual_multiplier: self.residual_multiplier,
        }
    }
}
