use cl_checkpoint::TensorSource;

use crate::Error;

/// Gives a tensor's bytes to `write` as they are, a megabyte at a time, with the place of each part's first byte; an empty
/// tensor's too, once.
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
