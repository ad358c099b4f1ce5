//! What the allocator does with memory that tensors leave.

/// Has glibc return every freed block of 1 MiB or more to the system from now on. Without glibc, nothing happens.
///
/// By default it keeps larger and larger blocks for later use. Where tensors of a layer come and go, as with weights that are
/// fetched for the time that the layer is computed, the process then holds twice the memory it needs.
pub fn give_memory_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets a parameter of the allocator, under its own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}
