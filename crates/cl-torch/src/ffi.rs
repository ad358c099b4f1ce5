//! Declarations of the functions in `csrc/`. A `tch::Tensor` wraps an `at::Tensor*`, which is what these functions take
//! and return.

use std::ffi::{c_char, c_int, c_void};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::TorchError;

pub(crate) type T = *mut C_tensor;
pub(crate) type NodeForward = extern "C" fn(*mut c_void, *const T, usize, *mut T) -> c_int;
pub(crate) type NodeBackward = extern "C" fn(*mut c_void, *const T, usize, T, *mut T) -> c_int;
pub(crate) type NodeFree = extern "C" fn(*mut c_void);

/// The C++ type `cl_group`.
#[repr(C)]
pub(crate) struct Group {
    _opaque: [u8; 0],
}

/// The C++ type `cl_work`.
#[repr(C)]
pub(crate) struct Work {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub(crate) fn cl_last_error() -> *const c_char;
    pub(crate) fn cl_set_error(text: *const c_char, length: usize);
    pub(crate) fn cl_disable_cudnn_attention() -> c_int;
    pub(crate) fn cl_backward(outputs: *const T, gradients: *const T, n: usize, keep_graph: c_int) -> c_int;
    pub(crate) fn cl_grad(
        outputs: *const T,
        gradients: *const T,
        n: usize,
        inputs: *const T,
        m: usize,
        result: *mut T,
        keep_graph: c_int,
        create_graph: c_int,
    ) -> c_int;
    pub(crate) fn cl_set_gradient(leaf: T, gradient: T) -> c_int;
    pub(crate) fn cl_fused_adamw(
        params: *const T,
        grads: *const T,
        exp_avg: *const T,
        exp_avg_sq: *const T,
        steps: *const T,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> c_int;
    pub(crate) fn cl_global_norm(tensors: *const T, n: usize, result: *mut T) -> c_int;
    pub(crate) fn cl_foreach_mul_(tensors: *const T, n: usize, factor: T) -> c_int;
    pub(crate) fn cl_flash_varlen(
        q: T,
        k: T,
        v: T,
        cu_q: T,
        cu_k: T,
        max_q: i64,
        max_k: i64,
        causal: c_int,
        scale: f64,
        window_left: i64,
        result: *mut T,
    ) -> c_int;
    pub(crate) fn cl_packed_attention(
        q: T,
        k: T,
        v: T,
        starts: *const i64,
        n: usize,
        scale: f64,
        result: *mut T,
    ) -> c_int;
    pub(crate) fn cl_append_stored(
        k: T,
        v: T,
        keys: T,
        values: T,
        slots: *const i64,
        lengths: *const i64,
        widths: *const i64,
        n: usize,
    ) -> c_int;
    pub(crate) fn cl_attend_stored(
        q: T,
        k: T,
        v: T,
        keys: T,
        values: T,
        prefix_keys: T,
        prefix_values: T,
        prefix: i64,
        slots: *const i64,
        lengths: *const i64,
        widths: *const i64,
        n: usize,
        scale: f64,
        softcap: f64,
        window: i64,
        result: *mut T,
    ) -> c_int;
    #[cfg(test)]
    pub(crate) fn cl_use_kernels(bits: c_int) -> c_int;
    pub(crate) fn cl_silu_mul(gate: T, up: T, result: *mut T) -> c_int;
    pub(crate) fn cl_rms_norm(x: T, weight: T, eps: f64, result: *mut T) -> c_int;
    pub(crate) fn cl_rotate(x: T, cos: T, sin: T, result: *mut T) -> c_int;
    pub(crate) fn cl_linears(tensors: *const T, scalings: *const f64, layers: usize, outputs: *mut T) -> c_int;
    pub(crate) fn cl_quantize(weight: T, nf4: c_int, results: *mut T) -> c_int;
    pub(crate) fn cl_dequantize(values: T, absmax: T, nested: T, kind: c_int, portable: c_int, result: *mut T)
    -> c_int;
    pub(crate) fn cl_has_onednn() -> c_int;
    pub(crate) fn cl_uses_onednn() -> c_int;
    pub(crate) fn cl_emulates_bf16() -> c_int;
    pub(crate) fn cl_use_onednn(on: c_int);
    pub(crate) fn cl_process_group(
        address: *const c_char,
        port: u16,
        serves: c_int,
        rank: c_int,
        world: c_int,
        timeout_ms: i64,
        prefix: *const c_char,
        interface: *const c_char,
        host: *const c_char,
        result: *mut *mut Group,
    ) -> c_int;
    pub(crate) fn cl_process_group_free(group: *mut Group);
    pub(crate) fn cl_all_reduce(group: *mut Group, tensor: T, result: *mut *mut Work) -> c_int;
    pub(crate) fn cl_broadcast(group: *mut Group, tensor: T, root: c_int, result: *mut *mut Work) -> c_int;
    pub(crate) fn cl_all_gather(group: *mut Group, output: T, input: T, result: *mut *mut Work) -> c_int;
    pub(crate) fn cl_reduce_scatter(group: *mut Group, output: T, input: T, result: *mut *mut Work) -> c_int;
    pub(crate) fn cl_barrier(group: *mut Group, result: *mut *mut Work) -> c_int;
    pub(crate) fn cl_work_wait(work: *mut Work) -> c_int;
    pub(crate) fn cl_work_free(work: *mut Work);
    pub(crate) fn cl_rust_node(
        inputs: *const T,
        n: usize,
        data: *mut c_void,
        forward: NodeForward,
        backward: NodeBackward,
        free: NodeFree,
        output: *mut T,
    ) -> c_int;
}

pub(crate) fn pointer(t: &Tensor) -> T {
    t.as_ptr() as T
}

pub(crate) fn pointers(tensors: &[&Tensor]) -> Vec<T> {
    tensors.iter().map(|t| pointer(t)).collect()
}

/// Calls `call` with a slot for a result and returns the tensor that it stores there.
///
/// # Panics
/// Panics if `call` returns a code other than 0.
///
/// # Safety
/// If `call` returns 0, it must have stored a tensor in its argument that nobody else owns.
pub(crate) unsafe fn filled(operator: &'static str, call: impl FnOnce(*mut T) -> c_int) -> Tensor {
    let mut result = std::ptr::null_mut();
    let code = call(&mut result);
    TorchError::check(operator, code).unwrap_or_else(|e| panic!("{e}"));
    // SAFETY: the caller's promise.
    unsafe { Tensor::from_ptr(result) }
}
