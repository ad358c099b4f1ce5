use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::TorchError;
use crate::ffi::{self, T, filled, pointer};

/// A storage format of quantized weights; both are those of bitsandbytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 4-bit NormalFloat with double quantization (Dettmers et al., "QLoRA", arXiv:2305.14314).
    ///
    /// Blocks of 64 values are divided by their largest absolute value (absmax) and rounded to the nearest of 16 codes.
    /// The mean of all absmax values is subtracted from them, and they are quantized in the same way, in blocks of 256
    /// with the 256 codes of the dynamic 8-bit type (arXiv:2110.02861).
    Nf4,
    /// 8-bit integers from -127 to 127, scaled by 1/127 of the absmax of each row: the weight format of LLM.int8()
    /// (Dettmers et al., arXiv:2208.07339).
    Int8,
}

impl Quantization {
    /// Returns the name used in files.
    pub fn name(self) -> &'static str {
        match self {
            Quantization::Nf4 => "nf4",
            Quantization::Int8 => "int8",
        }
    }

    /// Returns the size in bytes of a matrix `[outputs, inputs]`.
    pub fn bytes(self, outputs: u64, inputs: u64) -> u64 {
        let values = outputs * inputs;
        match self {
            Quantization::Nf4 => {
                let blocks = values.div_ceil(64);
                values.div_ceil(2) + blocks + 4 * (1 + blocks.div_ceil(256))
            }
            Quantization::Int8 => values + 4 * outputs,
        }
    }
}

/// A quantized matrix `[out, in]`.
///
/// ```
/// use cl_torch::tch::{Kind, Tensor};
/// use cl_torch::{Quantization, Quantized};
///
/// let weight = Tensor::from_slice(&[0.5f32, -1.0, 0.0, 2.0]).view([2, 2]);
/// let quantized = Quantized::new(&weight, Quantization::Int8)?;
/// // Each row's absmax is exact; the other values are off by up to half a step of absmax / 127.
/// let error = (quantized.dequantize(Kind::Float) - &weight).abs().max().double_value(&[]);
/// assert!(error <= 0.5 / 127.0);
/// # Ok::<(), cl_torch::TorchError>(())
/// ```
pub struct Quantized {
    /// NF4: two codes per byte, the first in the high bits, U8 `[out, in / 2]`. int8: I8 `[out, in]`.
    pub values: Tensor,
    /// NF4: codes of the absmax of each block of 64 values, U8 `[blocks]`. int8: the absmax of each row, f32 `[out]`.
    pub absmax: Tensor,
    /// NF4 only, f32 `[1 + blocks / 256, rounded up]`: the mean absmax of the blocks, then the largest absolute
    /// difference from it within each 256 blocks.
    pub nested: Option<Tensor>,
}

impl Quantized {
    /// Quantizes a matrix `[out, in]` on the CPU; the result is on the matrix's device.
    ///
    /// Values are rounded to the nearest code; of two codes at the same distance, NF4 takes the lower and int8 the even
    /// one. As in bitsandbytes, NF4 rounds the f32 values of the matrix, and int8 its f16 values.
    ///
    /// # Errors
    /// Returns [`TorchError::Libtorch`] if a value is NaN or infinite, for int8 if a value exceeds the range of f16,
    /// and for NF4 if `in` is odd.
    pub fn new(weight: &Tensor, format: Quantization) -> Result<Quantized, TorchError> {
        let mut parts: [T; 3] = [std::ptr::null_mut(); 3];
        // SAFETY: a live tensor and three slots, of which the first two, and for NF4 the third, are filled on success
        // with tensors that nobody else owns.
        unsafe {
            let nf4 = (format == Quantization::Nf4).into();
            TorchError::check("quantize", ffi::cl_quantize(pointer(weight), nf4, parts.as_mut_ptr()))?;
            let [values, absmax, nested] = parts;
            let owned = |t: T| Tensor::from_ptr(t).to_device(weight.device());
            Ok(Quantized {
                values: owned(values),
                absmax: owned(absmax),
                nested: (!nested.is_null()).then(|| owned(nested)),
            })
        }
    }

    /// Returns the format.
    pub fn format(&self) -> Quantization {
        if self.nested.is_some() { Quantization::Nf4 } else { Quantization::Int8 }
    }

    /// Returns the shape `[out, in]`.
    pub fn size(&self) -> [i64; 2] {
        let (output, stored) = self.values.size2().expect("values are a matrix");
        [output, if self.nested.is_some() { 2 * stored } else { stored }]
    }

    /// Dequantizes the matrix to a floating-point dtype: computed in f32 and rounded once, with bitsandbytes'
    /// operations.
    pub fn dequantize(&self, kind: Kind) -> Tensor {
        self.dequantize_with(kind, false)
    }

    /// Like [`Quantized::dequantize`]; `portable` selects libtorch's operators on a CPU too.
    fn dequantize_with(&self, kind: Kind, portable: bool) -> Tensor {
        let nested = self.nested.as_ref().map_or(std::ptr::null_mut(), pointer);
        let (values, absmax, kind) = (pointer(&self.values), pointer(&self.absmax), scalar_type(kind));
        // SAFETY: live tensors of one format, null for none; the result is filled on success with a tensor that nobody
        // else owns.
        unsafe { filled("dequantize", |y| ffi::cl_dequantize(values, absmax, nested, kind, portable.into(), y)) }
    }

    /// Returns the size in memory, in bytes.
    pub fn bytes(&self) -> u64 {
        let of = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
        of(&self.values) + of(&self.absmax) + self.nested.as_ref().map_or(0, of)
    }

    /// Returns the device.
    pub fn device(&self) -> Device {
        self.values.device()
    }

    /// Returns a second handle to the same tensors.
    pub fn shallow_clone(&self) -> Quantized {
        Quantized {
            values: self.values.shallow_clone(),
            absmax: self.absmax.shallow_clone(),
            nested: self.nested.as_ref().map(Tensor::shallow_clone),
        }
    }
}

/// Returns the number of a floating-point dtype in libtorch's `ScalarType`.
fn scalar_type(kind: Kind) -> i32 {
    match kind {
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::BFloat16 => 15,
        other => panic!("weights are dequantized to a floating dtype, not to {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::products::turn;
    use crate::testing;
    use crate::{LinearLayer, LinearWeight, LowRank, Products, linears, products, use_products};

    const FORMATS: [Quantization; 2] = [Quantization::Nf4, Quantization::Int8];

    fn noise(shape: &[i64], phase: f64) -> Tensor {
        testing::noise(shape, phase, Kind::Float)
    }

    fn largest(t: &Tensor) -> f64 {
        t.abs().max().double_value(&[])
    }

    #[test]
    fn the_loops_give_the_same_bits_as_libtorchs_operators() {
        // Blocks that end at the end of a row and blocks that do not; a last block that is not full; a row of zeros;
        // more than 256 blocks.
        for shape in [[6, 64], [7, 38], [1, 2], [40, 900]] {
            let weight = noise(&shape, 0.3);
            let _ = weight.get(0).zero_();
            for format in FORMATS {
                let q = Quantized::new(&weight, format).unwrap();
                assert_eq!((q.size().to_vec(), q.format()), (shape.to_vec(), format));
                assert_eq!(q.bytes(), format.bytes(shape[0] as u64, shape[1] as u64));
                for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
                    let dense = q.dequantize(kind);
                    assert_eq!((dense.size(), dense.kind()), (shape.to_vec(), kind));
                    assert!(dense.equal(&q.dequantize_with(kind, true)), "{shape:?} {format:?} {kind:?}");
                }
                assert!(q.dequantize(Kind::Float).get(0).equal(&weight.get(0)), "zeros stay zeros");
            }
        }
    }

    #[test]
    fn values_are_near_those_of_the_weight() {
        let weight = noise(&[48, 320], 0.5);
        for (format, bound) in [
            // Half of the widest gap between codes, 0.3038, and an absmax whose error is up to half of the widest gap
            // between 8-bit codes, 0.0141, times a difference below 1.
            (Quantization::Nf4, 0.152 + 0.008),
            // Half a step, and the rounding of values and absmax to f16.
            (Quantization::Int8, 0.5 / 127.0 + 1.0 / 2048.0),
        ] {
            let dense = Quantized::new(&weight, format).unwrap().dequantize(Kind::Float);
            let error = largest(&(&dense - &weight));
            assert!(error <= bound && error > bound / 4.0, "{format:?}: {error}");
            // Quantizing dequantized values again gives the same codes.
            if format == Quantization::Int8 {
                let again = Quantized::new(&dense, format).unwrap().dequantize(Kind::Float);
                // The f16 absmax was rounded.
                assert!(largest(&(again - &dense)) < 1.0 / 1024.0);
            }
        }
    }

    #[test]
    fn what_has_no_codes_is_refused() {
        let error = |weight: &Tensor, format| match Quantized::new(weight, format) {
            Ok(_) => String::new(),
            Err(e) => e.to_string(),
        };
        assert!(error(&noise(&[4, 5], 0.1), Quantization::Nf4).contains("even number of inputs, got 5"));
        assert_eq!(error(&noise(&[4, 5], 0.1), Quantization::Int8), "");
        for format in FORMATS {
            assert!(error(&noise(&[4], 0.1), format).contains("matrix"));
            for value in [f64::NAN, f64::INFINITY] {
                let weight = noise(&[4, 6], 0.1);
                let _ = weight.get(1).get(2).fill_(value);
                assert!(error(&weight, format).contains("NaN, infinite"), "{format:?} {value}");
            }
        }
        assert!(error(&(noise(&[4, 6], 0.1) * 1e6), Quantization::Int8).contains("too large for Half"));
    }

    /// Three layers on one input: one with a bias and an update, one with neither, a dense one with an update.
    fn outputs(t: &[Tensor], first: LinearWeight<'_>, second: LinearWeight<'_>) -> Vec<Tensor> {
        let update = |a, b, scaling| Some(LowRank { a, b, scaling });
        let layers = [
            LinearLayer { weight: first, bias: Some(&t[1]), low_rank: update(&t[2], &t[3], 2.0) },
            LinearLayer { weight: second, bias: None, low_rank: None },
            LinearLayer { weight: LinearWeight::Dense(&t[4]), bias: None, low_rank: update(&t[5], &t[6], 0.5) },
        ];
        linears(&t[0], &layers)
    }

    #[test]
    fn linear_layers_and_their_gradients_are_those_of_the_dequantized_weights() {
        let _turn = turn();
        let before = products();
        let shapes: [&[i64]; 7] = [&[50, 24], &[40], &[4, 24], &[40, 4], &[16, 24], &[2, 24], &[16, 2]];
        let leaves = || -> Vec<Tensor> {
            let leaf = |(i, shape): (usize, &&[i64])| noise(shape, 0.1 * i as f64).set_requires_grad(i != 4);
            shapes.iter().enumerate().map(leaf).collect()
        };
        let gradients = |y: &[Tensor], leaves: &[Tensor]| -> Vec<Tensor> {
            let weighted = |i: usize| (&y[i] * noise(&y[i].size(), 0.7 + i as f64)).sum(Kind::Float);
            (weighted(0) + weighted(1) + weighted(2)).backward();
            leaves.iter().map(Tensor::grad).collect()
        };
        for library in [Products::Libtorch, Products::Onednn].into_iter().filter(|p| p.is_available()) {
            assert!(use_products(library));
            for format in FORMATS {
                let first = Quantized::new(&noise(&[40, 24], 1.1), format).unwrap();
                let second = Quantized::new(&noise(&[8, 24], 1.2), format).unwrap();
                let (ours, theirs) = (leaves(), leaves());
                let y = outputs(&ours, LinearWeight::Quantized(&first), LinearWeight::Quantized(&second));
                let dense = [&first, &second].map(|q| q.dequantize(Kind::Float));
                let expected = outputs(&theirs, (&dense[0]).into(), (&dense[1]).into());
                // Both compute the same products of the same numbers.
                assert!(y.iter().zip(&expected).all(|(a, b)| a.equal(b)), "{library:?} {format:?}");
                let pairs = gradients(&y, &ours).into_iter().zip(gradients(&expected, &theirs)).enumerate();
                for (i, (a, b)) in pairs.filter(|(i, _)| *i != 4) {
                    assert!(a.defined() && a.equal(&b), "{library:?} {format:?} {i}");
                }
            }
        }
        assert!(use_products(before));
    }
}
