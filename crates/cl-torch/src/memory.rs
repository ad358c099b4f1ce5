//! The memory allocator of the program and of libtorch's tensors.

/// jemalloc in place of glibc's allocator, for Rust and, because the program exports `malloc`, for libtorch.
///
/// The tensors of a training step are allocated and freed in every step. With glibc's allocator, this takes time for
/// searching and merging lists of large free blocks, and memory is returned to the system that the next step needs
/// again (docs/benchmarks.md).
#[cfg(all(feature = "jemalloc", target_os = "linux", target_env = "gnu"))]
mod jemalloc {
    use std::ffi::c_char;

    use tikv_jemalloc_ctl::raw;
    use tikv_jemallocator::Jemalloc;

    #[global_allocator]
    static ALLOCATOR: Jemalloc = Jemalloc;

    /// Options of jemalloc, which reads this symbol before `main`, and the environment variable `MALLOC_CONF` after it.
    ///
    /// By default, allocations of 8 MiB or more have their own arena, which returns freed memory to the system at once,
    /// and other free memory is returned within seconds, even if every step needs it again and the system has to zero
    /// it each time. With these options, it is kept until [`release_memory`](super::release_memory).
    #[unsafe(export_name = "malloc_conf")]
    pub(super) static OPTIONS: &c_char = {
        let text = c"oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:0";
        // SAFETY: a C string has at least its terminator.
        unsafe { &*text.as_ptr() }
    };

    /// Sets the time after which existing arenas return free memory to the system: at once if 0, never if −1.
    fn set_decay(milliseconds: isize) -> Result<(), tikv_jemalloc_ctl::Error> {
        // SAFETY: the types are those that jemalloc's manual gives for these names.
        unsafe {
            for arena in 0..raw::read::<u32>(b"arenas.narenas\0")? {
                // An arena that was never used has no settings yet and takes the defaults for new arenas.
                let _ = raw::write(format!("arena.{arena}.dirty_decay_ms\0").as_bytes(), milliseconds);
            }
        }
        Ok(())
    }

    /// Makes existing and new arenas return freed memory to the system at once from now on.
    pub(super) fn give_memory_back() -> Result<(), tikv_jemalloc_ctl::Error> {
        // SAFETY: as above.
        unsafe { raw::write(b"arenas.dirty_decay_ms\0", 0isize)? };
        set_decay(0)
    }

    /// Returns free memory to the system once.
    pub(super) fn release_memory() -> Result<(), tikv_jemalloc_ctl::Error> {
        // SAFETY: as above. What later arenas do, after [`give_memory_back`] too.
        let later = unsafe { raw::read::<isize>(b"arenas.dirty_decay_ms\0")? };
        set_decay(0)?;
        set_decay(later)
    }
}

/// Makes the allocator return freed memory to the system at once from now on.
///
/// This applies to jemalloc with the feature `jemalloc`, and otherwise to glibc's allocator for blocks of 1 MiB or
/// more. With other allocators, it has no effect.
///
/// By default, free blocks are kept for later use. If the tensors of a layer are short-lived, such as weights that are
/// gathered only while the layer is computed, the process would then hold twice the memory it needs.
pub fn give_memory_back() {
    #[cfg(all(feature = "jemalloc", target_os = "linux", target_env = "gnu"))]
    {
        let done = jemalloc::give_memory_back();
        debug_assert!(done.is_ok(), "{done:?}");
    }
    #[cfg(all(not(feature = "jemalloc"), target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets a parameter of the allocator, under its own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}

/// Returns freed memory to the system once.
///
/// Call it when a process has completed a large task and continues with another one: until then, jemalloc keeps freed
/// memory for later use.
pub fn release_memory() {
    #[cfg(all(feature = "jemalloc", target_os = "linux", target_env = "gnu"))]
    {
        let done = jemalloc::release_memory();
        debug_assert!(done.is_ok(), "{done:?}");
    }
    #[cfg(all(not(feature = "jemalloc"), target_os = "linux", target_env = "gnu"))]
    // SAFETY: a function of the allocator, under its own lock.
    unsafe {
        libc::malloc_trim(0);
    }
}
