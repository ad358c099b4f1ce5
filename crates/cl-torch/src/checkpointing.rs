use std::any::Any;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;

use crate::ffi::{self, T, pointers};
use crate::{TorchError, backward};

type Run = Box<dyn Fn(&[Tensor]) -> Tensor + Send>;

struct Segment {
    run: Run,
    around: Box<dyn Around>,
}

/// Hooks around the forward pass and the recomputation of a checkpointed segment, for example to fetch weights that are
/// not kept in memory.
pub trait Around: Send {
    /// Called before the segment is computed, in the forward pass and again before it is recomputed in the backward
    /// pass.
    fn before(&self) {}

    /// Called after the forward pass. Nothing of the segment, such as its weights, is needed until it is recomputed.
    fn after_forward(&self) {}

    /// Called after the backward pass of the segment, when all of its gradients have been computed.
    fn after_backward(&self) {}
}

impl Around for () {}

/// Activation checkpointing: computes `f(inputs)` without keeping its activations, and recomputes it in the backward
/// pass. Gradients reach both the inputs that require them and every leaf used inside `f`.
///
/// At least one input must require a gradient; otherwise the node is not part of any graph. `f` must be a pure
/// function: dropout inside it has to draw the same mask both times. On CUDA, the recomputation runs on autograd's own
/// thread, which is why `f` is `Send`. Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost",
/// arXiv:1604.06174.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] if `f` panics or libtorch rejects the node.
pub fn checkpoint(inputs: &[&Tensor], f: impl Fn(&[Tensor]) -> Tensor + Send + 'static) -> Result<Tensor, TorchError> {
    checkpoint_around(inputs, f, ())
}

/// Like [`checkpoint`], with hooks before and after each pass.
///
/// # Errors
/// As for [`checkpoint`].
pub fn checkpoint_around(
    inputs: &[&Tensor],
    f: impl Fn(&[Tensor]) -> Tensor + Send + 'static,
    around: impl Around + 'static,
) -> Result<Tensor, TorchError> {
    let segment = Box::new(Segment { run: Box::new(f), around: Box::new(around) });
    let data = Box::into_raw(segment).cast::<c_void>();
    let mut output = std::ptr::null_mut();
    // SAFETY: `data` is a boxed `Segment`, handed over to the node, which frees it through `free` exactly once.
    let code = unsafe {
        ffi::cl_rust_node(pointers(inputs).as_ptr(), inputs.len(), data, forward, recompute, free, &mut output)
    };
    TorchError::check("checkpoint", code)?;
    // SAFETY: on success `output` is a tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(output) })
}

/// Returns a tensor with the values of `x`, and calls `f` in the backward pass once the gradients of everything
/// computed from that tensor are complete.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] if libtorch rejects the node.
pub fn on_backward(x: &Tensor, f: impl Fn() + Send + 'static) -> Result<Tensor, TorchError> {
    let data = Box::into_raw(Box::new(Box::new(f) as Callback)).cast::<c_void>();
    let mut output = std::ptr::null_mut();
    // SAFETY: `data` is a boxed `Callback`, handed over to the node, which frees it through `free_callback` exactly
    // once.
    let code =
        unsafe { ffi::cl_rust_node(pointers(&[x]).as_ptr(), 1, data, pass_on, call, free_callback, &mut output) };
    TorchError::check("on_backward", code)?;
    // SAFETY: on success `output` is a tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(output) })
}

type Callback = Box<dyn Fn() + Send>;

extern "C" fn pass_on(_: *mut c_void, inputs: *const T, _: usize, output: *mut T) -> c_int {
    // SAFETY: one live input, a valid slot. Returns a view, because a node may not return its input itself.
    unsafe { *output = release(Tensor::clone_from_ptr(*inputs).detach()) };
    0
}

extern "C" fn call(data: *mut c_void, _: *const T, _: usize, grad: T, grad_inputs: *mut T) -> c_int {
    // SAFETY: the box of `on_backward`; `grad` is live, `grad_inputs` has one slot.
    let (callback, grad) = unsafe { (&*data.cast::<Callback>(), Tensor::clone_from_ptr(grad)) };
    match catch_unwind(AssertUnwindSafe(callback)) {
        Ok(()) => {
            // SAFETY: as above; ownership of the gradient moves to the shim.
            unsafe { *grad_inputs = release(grad) };
            0
        }
        Err(panic) => fail(&panic_text(panic.as_ref())),
    }
}

extern "C" fn free_callback(data: *mut c_void) {
    // SAFETY: `data` came from `Box::into_raw` in `on_backward` and is freed once.
    drop(unsafe { Box::from_raw(data.cast::<Callback>()) });
}

extern "C" fn forward(data: *mut c_void, inputs: *const T, n: usize, output: *mut T) -> c_int {
    // SAFETY: called by the shim with the box of `checkpoint` and `n` live tensors.
    let (segment, inputs) = unsafe { (&*data.cast::<Segment>(), clone_all(inputs, n)) };
    let run = || {
        let _no_graph = tch::no_grad_guard();
        segment.around.before();
        let output = (segment.run)(&inputs);
        segment.around.after_forward();
        output
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(t) => {
            // SAFETY: `output` is a valid slot; ownership of the tensor moves to the shim.
            unsafe { *output = release(t) };
            0
        }
        Err(panic) => fail(&panic_text(panic.as_ref())),
    }
}

extern "C" fn recompute(data: *mut c_void, inputs: *const T, n: usize, grad: T, grad_inputs: *mut T) -> c_int {
    // SAFETY: as in `forward`; `grad` is live, `grad_inputs` has `n` slots.
    let (segment, inputs, grad) =
        unsafe { (&*data.cast::<Segment>(), clone_all(inputs, n), Tensor::clone_from_ptr(grad)) };
    let run = || -> Result<Vec<Tensor>, TorchError> {
        let leaves: Vec<Tensor> = inputs
            .iter()
            .map(|t| {
                let leaf = t.detach();
                if t.requires_grad() { leaf.set_requires_grad(true) } else { leaf }
            })
            .collect();
        segment.around.before();
        let out = tch::with_grad(|| (segment.run)(&leaves));
        backward(&[&out], &[&grad])?;
        segment.around.after_backward();
        Ok(leaves)
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(leaves)) => {
            for (i, leaf) in leaves.iter().enumerate() {
                if leaf.requires_grad() {
                    // SAFETY: slot `i` exists; ownership of the gradient moves to the shim.
                    unsafe { *grad_inputs.add(i) = release(leaf.grad()) };
                }
            }
            0
        }
        Ok(Err(error)) => fail(&error.to_string()),
        Err(panic) => fail(&panic_text(panic.as_ref())),
    }
}

/// Passes a message on to the shim, which adds it to libtorch's error.
fn fail(message: &str) -> c_int {
    // SAFETY: the shim copies `length` bytes of the text.
    unsafe { ffi::cl_set_error(message.as_ptr().cast(), message.len()) };
    -1
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    // A panic of tch contains a C++ stack trace.
    text.and_then(|text| text.lines().next()).unwrap_or("panic").to_owned()
}

extern "C" fn free(data: *mut c_void) {
    // SAFETY: `data` came from `Box::into_raw` in `checkpoint` and is freed once.
    drop(unsafe { Box::from_raw(data.cast::<Segment>()) });
}

unsafe fn clone_all(tensors: *const T, n: usize) -> Vec<Tensor> {
    // SAFETY: the caller hands `n` live tensors.
    (0..n).map(|i| unsafe { Tensor::clone_from_ptr(*tensors.add(i)) }).collect()
}

fn release(t: Tensor) -> T {
    ManuallyDrop::new(t).as_mut_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tch::{Device, Kind};

    fn leaf(shape: &[i64], scale: f64) -> Tensor {
        let n: i64 = shape.iter().product();
        let t = (Tensor::arange(n, (Kind::Float, Device::Cpu)) * 0.7).sin() * scale;
        t.reshape(shape).set_requires_grad(true)
    }

    #[test]
    fn gradients_are_bit_equal_to_plain_backward() {
        let run = |recomputed: bool| {
            let (x, w) = (leaf(&[3, 4], 1.), leaf(&[4, 4], 0.5));
            let w2 = w.shallow_clone();
            let f = move |i: &[Tensor]| i[0].matmul(&w2).tanh();
            let y = if recomputed { checkpoint(&[&x], f).unwrap() } else { f(&[x.shallow_clone()]) };
            (&y * &y).sum(Kind::Float).backward();
            (x.grad(), w.grad())
        };
        let (plain, recomputed) = (run(false), run(true));
        assert_eq!(plain.0, recomputed.0);
        assert_eq!(plain.1, recomputed.1);
    }

    #[test]
    fn the_closure_and_what_it_holds_are_freed_with_the_graph() {
        for backward in [true, false] {
            let held = Arc::new(());
            let inside = Arc::clone(&held);
            let x = leaf(&[2], 1.);
            let y = checkpoint(&[&x], move |i| {
                let _inside = &inside;
                i[0].tanh()
            })
            .unwrap();
            assert_eq!(Arc::strong_count(&held), 2, "the graph needs it");
            if backward {
                y.sum(Kind::Float).backward();
            }
            drop(y);
            assert_eq!(Arc::strong_count(&held), 1, "backward {backward}");
        }
    }

    #[test]
    fn a_call_in_the_backward_pass_finds_the_gradients_that_are_behind_it() {
        let (x, before, after) = (leaf(&[2, 2], 1.), leaf(&[2, 2], 0.5), leaf(&[2, 2], 2.));
        let seen = Arc::new(AtomicUsize::new(0));
        let (seen_inside, behind, ahead) = (Arc::clone(&seen), after.shallow_clone(), before.shallow_clone());
        let y = on_backward(&x.matmul(&before), move || {
            assert!(behind.grad().defined() && !ahead.grad().defined());
            seen_inside.fetch_add(1, Ordering::Relaxed);
        });
        y.unwrap().matmul(&after).sum(Kind::Float).backward();
        assert_eq!(seen.load(Ordering::Relaxed), 1);
        let (with, w) = (x.grad(), before.grad());
        let plain = x.detach().set_requires_grad(true);
        let w2 = before.detach().set_requires_grad(true);
        plain.matmul(&w2).matmul(&after.detach()).sum(Kind::Float).backward();
        assert_eq!((with, w), (plain.grad(), w2.grad()));
    }

    #[test]
    fn a_panic_in_the_second_pass_is_an_error() {
        let x = leaf(&[2], 1.);
        let calls = AtomicUsize::new(0);
        let y = checkpoint(&[&x], move |i| {
            assert_eq!(calls.fetch_add(1, Ordering::Relaxed), 0, "the second pass fails");
            i[0].tanh()
        });
        let y = y.unwrap();
        let message = backward(&[&y], &[&y.ones_like()]).unwrap_err().to_string();
        assert!(message.contains("backward of a Rust autograd node failed: assertion"), "{message}");
    }

    #[test]
    fn a_panic_inside_is_an_error() {
        let x = leaf(&[2], 1.);
        let r = checkpoint(&[&x], |_| panic!("inside"));
        let message = r.unwrap_err().to_string();
        assert!(message.contains("forward of a Rust autograd node failed: inside"), "{message}");
    }
}
