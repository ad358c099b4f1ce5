//! Integer hashes that derive the seed of a random choice from a run's seed and a name.

/// Offset basis of 64-bit FNV-1a.
pub const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// Computes the 64-bit FNV-1a hash (Fowler, Noll and Vo) of a text's bytes, starting from `basis`: [`FNV_OFFSET`], or
/// that combined with a seed.
///
/// ```
/// use cl_checkpoint::seed::{FNV_OFFSET, fnv1a};
/// assert_eq!(fnv1a(FNV_OFFSET, "foobar"), 0x8594_4171_f739_67e8); // from the authors' test vectors
/// ```
pub fn fnv1a(basis: u64, text: &str) -> u64 {
    text.bytes().fold(basis, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Returns the output of SplitMix64 (Steele, Lea and Flood, 2014) for the state `key`, which spreads adjacent keys over
/// all 64 bits.
///
/// ```
/// assert_eq!(cl_checkpoint::seed::splitmix64(0), 0xe220_a839_7b1d_cdaf);
/// ```
pub fn splitmix64(key: u64) -> u64 {
    let mut z = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
