use tch::Tensor;

use crate::ffi::{self, T, pointer};
use crate::{Quantized, TorchError};

/// One of several linear layers over the same input.
#[derive(Clone, Copy)]
pub struct LinearLayer<'a> {
    /// `[out, in]`.
    pub weight: LinearWeight<'a>,
    /// `[out]`.
    pub bias: Option<&'a Tensor>,
    /// Optional low-rank update of the weight.
    pub low_rank: Option<LowRank<'a>>,
}

/// The weight of a linear layer.
#[derive(Clone, Copy)]
pub enum LinearWeight<'a> {
    /// A dense tensor in the dtype of the input.
    Dense(&'a Tensor),
    /// A quantized matrix. It is dequantized in the forward pass and again in the backward pass; only the quantized
    /// values are kept in between.
    Quantized(&'a Quantized),
}

impl<'a> From<&'a Tensor> for LinearWeight<'a> {
    fn from(weight: &'a Tensor) -> LinearWeight<'a> {
        LinearWeight::Dense(weight)
    }
}

/// A low-rank update `ΔW = scaling · B·A` (Hu et al., "LoRA", arXiv:2106.09685).
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// `[r, in]`.
    pub a: &'a Tensor,
    /// `[out, r]`.
    pub b: &'a Tensor,
    /// The factor by which `B·A` is multiplied.
    pub scaling: f64,
}

/// Computes `x·Wᵀ + b`: `x` is `[rows, in]`, `weight` is `[out, in]`, `bias` is `[out]`.
///
/// Equivalent to libtorch's `linear`, except that f32 products on a CPU are computed by the library that [`products`]
/// returns. Both libraries accumulate in f32; results differ in the last bits. The result is differentiable.
///
/// ```
/// use cl_torch::tch::Tensor;
/// let (x, w) = (Tensor::from_slice(&[1f32, 2.0]).view([1, 2]), Tensor::from_slice(&[3f32, 4.0]).view([1, 2]));
/// assert_eq!(cl_torch::linear(&x, &w, None).double_value(&[0, 0]), 11.0);
/// ```
///
/// [`products`]: crate::products
///
/// # Panics
/// Panics if shapes or dtypes do not match, like [`Tensor::linear`].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    linears(x, &[LinearLayer { weight: weight.into(), bias, low_rank: None }]).pop().expect("one output a layer")
}

/// Computes `x·Wᵀ + b + scaling · (x·Aᵀ)·Bᵀ` for each layer.
///
/// `x` is `[rows, in]`; each output is `[rows, out]`. All tensors except quantized weights must have the dtype of `x`,
/// and so have the outputs.
///
/// All layers form one autograd node: the products with all A are computed as one, and sums are accumulated in place
/// instead of in a copy (the low-rank updates into the outputs, the contributions of all layers into the gradient of
/// `x`). Gradients are computed only for tensors that require one. There is no second derivative.
///
/// # Panics
/// Panics if shapes or dtypes do not match.
pub fn linears(x: &Tensor, layers: &[LinearLayer<'_>]) -> Vec<Tensor> {
    let optional = |t: Option<&Tensor>| t.map_or(std::ptr::null_mut(), pointer);
    let mut tensors: Vec<T> = vec![pointer(x)];
    for LinearLayer { weight, bias, low_rank } in layers {
        let (a, b) = (low_rank.map(|l| l.a), low_rank.map(|l| l.b));
        let (weight, absmax, nested) = match weight {
            LinearWeight::Dense(weight) => (*weight, None, None),
            LinearWeight::Quantized(q) => (&q.values, Some(&q.absmax), q.nested.as_ref()),
        };
        tensors.extend([
            pointer(weight),
            optional(*bias),
            optional(a),
            optional(b),
            optional(absmax),
            optional(nested),
        ]);
    }
    let scalings: Vec<f64> = layers.iter().map(|l| l.low_rank.map_or(1.0, |l| l.scaling)).collect();
    let mut outputs: Vec<T> = vec![std::ptr::null_mut(); layers.len()];
    // SAFETY: one live tensor, then six for each layer, or null; `outputs` has one slot per layer and is filled on
    // success with tensors that nobody else owns.
    unsafe {
        let code = ffi::cl_linears(tensors.as_ptr(), scalings.as_ptr(), layers.len(), outputs.as_mut_ptr());
        TorchError::check("linear", code).unwrap_or_else(|e| panic!("{e}"));
        outputs.into_iter().map(|y| Tensor::from_ptr(y)).collect()
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::products::turn;
    use crate::testing;
    use crate::{Products, emulates_bf16, products, use_products};

    fn noise(shape: &[i64], phase: f64) -> Tensor {
        testing::noise(shape, phase, Kind::Float)
    }

    fn close(a: &Tensor, b: &Tensor) -> bool {
        // Sums of up to 130 products of numbers below 1, in another order.
        a.size() == b.size() && a.allclose(b, 1e-5, 1e-5, false)
    }

    #[test]
    fn equals_libtorchs() {
        let (w, b) = (noise(&[40, 24], 0.1), noise(&[40], 0.2));
        for rows in [0, 1, 3, 130] {
            let wide = noise(&[rows, 48], 0.3);
            for x in [noise(&[rows, 24], 0.4), wide.narrow(1, 3, 24)] {
                for bias in [None, Some(&b)] {
                    let y = linear(&x, &w, bias);
                    assert_eq!((y.size(), y.kind()), (vec![rows, 40], Kind::Float));
                    assert!(close(&y, &x.linear(&w, bias)), "{rows}");
                }
            }
            let half = noise(&[rows, 24], 0.4).to_kind(Kind::BFloat16);
            let w = w.to_kind(Kind::BFloat16);
            assert!(linear(&half, &w, None).equal(&half.linear::<&Tensor>(&w, None)));
        }
        let wrong = std::panic::catch_unwind(|| linear(&noise(&[5, 23], 0.5), &noise(&[40, 24], 0.1), None));
        assert!(wrong.is_err());
    }

    /// Large enough to be computed in f32 on processors without bf16 instructions, in two blocks of columns.
    #[test]
    fn large_products_of_bf16_are_rounded_once() {
        let (rows, input, output) = (65, 48, 400_000);
        let half = |shape: &[i64], phase| noise(shape, phase).to_kind(Kind::BFloat16);
        let (x, w, b) = (half(&[rows, input], 0.1), half(&[output, input], 0.2), half(&[output], 0.3));
        for bias in [None, Some(&b)] {
            let y = linear(&x, &w, bias);
            assert_eq!((y.size(), y.kind()), (vec![rows, output], Kind::BFloat16));
            let [x, w] = [&x, &w].map(|t| t.to_kind(Kind::Float));
            let exact = x.linear(&w, bias.map(|b| b.to_kind(Kind::Float)));
            // Half a unit in the last place of an 8-bit mantissa, and f32 sums in another order.
            let room = exact.abs() * 2f64.powi(-8) + 1e-5;
            assert!((y.to_kind(Kind::Float) - exact).abs().le_tensor(&room).all().int64_value(&[]) == 1);
        }
    }

    #[test]
    fn a_row_among_few_has_the_same_result_whatever_their_number() {
        testing::with_every_width(|bits| {
            for kind in [Kind::Float, Kind::BFloat16] {
                for (depth, columns) in [(64, 1), (65, 6), (130, 40), (576, 303)] {
                    let (x, w) =
                        (testing::noise(&[60, depth], 0.1, kind), testing::noise(&[columns, depth], 0.2, kind));
                    let b = testing::noise(&[columns], 0.3, kind);
                    let first = linear(&x.narrow(0, 0, 1), &w, Some(&b));
                    for rows in [1, 2, 5, 6, 7, 13, 16, 32, 48, 49, 60] {
                        let some = x.narrow(0, 0, rows);
                        let y = linear(&some, &w, Some(&b));
                        assert_eq!((y.size(), y.kind()), (vec![rows, columns], kind));
                        let [x, w, b] = [&some, &w, &b].map(|t| t.to_kind(Kind::Double));
                        let exact = x.linear(&w, Some(&b));
                        // Sums of 576 products below 1 in f32, in any order; in bf16 the result keeps 8 bits.
                        let room = exact.abs() * if kind == Kind::Float { 0.0 } else { 2f64.powi(-8) } + 1e-4;
                        let close = (y.to_kind(Kind::Double) - exact).abs().le_tensor(&room).all();
                        assert!(close.int64_value(&[]) == 1, "{bits} bits, {kind:?}, {rows} of {depth}, {columns}");
                        let own = bits > 128 && (kind == Kind::Float || emulates_bf16());
                        if own && rows <= 16 {
                            assert!(
                                y.narrow(0, 0, 1).equal(&first),
                                "{bits} bits, {kind:?}, {rows} of {depth}, {columns}"
                            );
                        }
                    }
                    if columns > 100 {
                        let part = linear(&x.narrow(0, 0, 3), &w.narrow(0, 8, 40), None);
                        let whole = linear(&x.narrow(0, 0, 3), &w, None).narrow(1, 8, 40);
                        let own = bits > 128 && (kind == Kind::Float || emulates_bf16());
                        let alike =
                            if own { part.equal(&whole) } else { part.allclose(&whole, 2f64.powi(-7), 1e-4, false) };
                        assert!(alike, "{bits} bits, {kind:?}");
                    }
                }
            }
        });
    }

    /// Input, weights and updates of three layers: one with an update and a bias, one with neither, one with an update
    /// of another rank.
    fn leaves(frozen: bool) -> Vec<Tensor> {
        let shapes: [&[i64]; 9] =
            [&[130, 24], &[40, 24], &[40], &[4, 24], &[40, 4], &[8, 24], &[16, 24], &[2, 24], &[16, 2]];
        let leaf = |(i, shape): (usize, &&[i64])| {
            let learns = !(frozen && [1, 2, 5, 6].contains(&i));
            noise(shape, 0.1 * i as f64).set_requires_grad(learns)
        };
        shapes.iter().enumerate().map(leaf).collect()
    }

    fn forward(t: &[Tensor]) -> Vec<Tensor> {
        let update = |a, b, scaling| Some(LowRank { a, b, scaling });
        let layers = [
            LinearLayer { weight: LinearWeight::Dense(&t[1]), bias: Some(&t[2]), low_rank: update(&t[3], &t[4], 2.0) },
            LinearLayer { weight: LinearWeight::Dense(&t[5]), bias: None, low_rank: None },
            LinearLayer { weight: LinearWeight::Dense(&t[6]), bias: None, low_rank: update(&t[7], &t[8], 0.5) },
        ];
        linears(&t[0], &layers)
    }

    /// The same computation with libtorch's own operators and derivatives.
    fn reference(t: &[Tensor]) -> Vec<Tensor> {
        let product = |x: &Tensor, w: &Tensor| x.linear::<&Tensor>(w, None);
        let x = &t[0];
        vec![
            x.linear(&t[1], Some(&t[2])) + product(&product(x, &t[3]), &t[4]) * 2.0,
            product(x, &t[5]),
            product(x, &t[6]) + product(&product(x, &t[7]), &t[8]) * 0.5,
        ]
    }

    fn gradients(outputs: &[Tensor], leaves: &[Tensor]) -> Vec<Tensor> {
        // The second output is not used.
        let weighted = |i: usize| (&outputs[i] * noise(&outputs[i].size(), 0.7 + i as f64)).sum(Kind::Float);
        (weighted(0) + weighted(2)).backward();
        leaves.iter().map(Tensor::grad).collect()
    }

    #[test]
    fn several_layers_and_their_gradients_equal_libtorchs_with_either_library() {
        let _turn = turn();
        let before = products();
        for library in [Products::Libtorch, Products::Onednn].into_iter().filter(|p| p.is_available()) {
            assert!(use_products(library));
            for frozen in [false, true] {
                let (ours, theirs) = (leaves(frozen), leaves(frozen));
                let (y, expected) = (forward(&ours), reference(&theirs));
                // Recomputed activations are bit-identical.
                assert!(y.iter().zip(tch::no_grad(|| forward(&ours))).all(|(a, b)| a.equal(&b)), "{library:?}");
                assert!(y.iter().zip(&expected).all(|(a, b)| close(a, b)), "{library:?}");
                for (i, (a, b)) in gradients(&y, &ours).iter().zip(gradients(&expected, &theirs)).enumerate() {
                    assert_eq!(a.defined(), b.defined(), "{i}");
                    assert!(!a.defined() || close(a, &b), "{library:?}, {frozen}, {i}");
                }
            }
        }
        assert!(use_products(before));
    }
}
