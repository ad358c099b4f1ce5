use cl_checkpoint::TensorSource;

use crate::Error;

/// Passes the bytes of a tensor to `write` unchanged, in chunks of at most 1 MiB, each with its byte offset. For an
/// empty tensor, `write` is called once.
pub(crate) fn copy_bytes(
    source: &dyn TensorSource,
    tensor: &str,
    write: impl Fn(usize, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let length = source.info(tensor).map_or(0, |info| info.byte_len());
    let mut buffer = vec![0; length.min(1 << 20)];
    let mut offset = 0;
    loop {
        let part = buffer.len().min(length - offset);
        source.read(tensor, offset, &mut buffer[..part])?;
        write(offset, &buffer[..part])?;
        offset += part;
        if offset == length {
            return Ok(());
        }
    }
}
