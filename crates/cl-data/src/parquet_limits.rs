//! Limits on the decompressed size of a Parquet file.
//!
//! A few bytes of a page can represent gigabytes: a compressed page declares its size, dictionaries and delta encodings
//! declare how many values they contain, and a run of one dictionary entry may have any length. The crate `parquet`
//! allocates what is declared and has no option to limit that, so every page is checked before it is decoded.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;
use lz4_flex::frame::FrameDecoder;
use parquet::basic::{Compression, Encoding, Type as Physical};
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use parquet::file::reader::RowGroupReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::{ColumnDescPtr, Type};

/// Limit in bytes that applies to any file: total size of its pages, and of the texts in its rows.
const MIN_BYTES: u64 = 1 << 30;
/// For a larger file, the limit is this multiple of its own size.
const EXPANSION: u64 = 100;
/// Bytes of the limit per value, nulls included; a value in memory takes about as much.
const BYTES_A_VALUE: u64 = 64;
/// Maximum size of a dictionary in bytes. Writers stop at about 1 MiB.
const MAX_DICTIONARY: u64 = 64 << 20;

fn error(message: String) -> ParquetError {
    ParquetError::General(message)
}

/// The remaining part of a file's limits.
pub(crate) struct Budget {
    limit: u64,
    pages: AtomicU64,
    texts: AtomicU64,
    values: AtomicU64,
}

impl Budget {
    /// Creates the limits for a file of `file_size` bytes.
    pub(crate) fn new(file_size: u64) -> Budget {
        let limit = MIN_BYTES.max(file_size.saturating_mul(EXPANSION));
        let full = || AtomicU64::new(limit);
        Budget { limit, pages: full(), texts: full(), values: AtomicU64::new(limit / BYTES_A_VALUE) }
    }

    /// Counts the bytes of the texts in a row.
    pub(crate) fn texts(&self, bytes: u64) -> Result<()> {
        self.spend(&self.texts, bytes, || format!("its rows contain more than {} bytes of text", self.limit))
    }

    /// Counts the values of a page, or rows.
    pub(crate) fn values(&self, count: u64) -> Result<()> {
        let limit = self.limit / BYTES_A_VALUE;
        self.spend(&self.values, count, || format!("it contains more than {limit} values"))
    }

    fn pages(&self, bytes: u64) -> Result<()> {
        self.spend(&self.pages, bytes, || format!("its pages unpack to more than {} bytes", self.limit))
    }

    fn spend(&self, left: &AtomicU64, amount: u64, what: impl Fn() -> String) -> Result<()> {
        let less = |left: u64| left.checked_sub(amount);
        let spent = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        let reason = || format!("{}, too many for a file of its size", what());
        spent.map(|_| ()).map_err(|_| error(reason()))
    }
}

/// Checks the schema in a file's footer: the decoder allocates as many children of a group as it declares, and follows
/// nested groups by recursion. Invalid footers are left to the decoder.
pub(crate) fn check_schema(mut file: &File) -> Result<()> {
    let mut tail = [0; 8];
    let size = file.seek(SeekFrom::End(0))?;
    if size < 8 {
        return Ok(());
    }
    file.seek(SeekFrom::End(-8))?;
    file.read_exact(&mut tail)?;
    let [a, b, c, d, ..] = tail;
    let length = u64::from(u32::from_le_bytes([a, b, c, d]));
    if length > size - 8 {
        return Ok(());
    }
    file.seek(SeekFrom::Start(size - 8 - length))?;
    let mut thrift = Thrift { reader: BufReader::new(file).take(length) };
    let mut last = 0;
    while let Some((field, kind)) = thrift.field(&mut last)? {
        match (field, kind) {
            (2, LIST) => return schema(&mut thrift),
            (_, kind) => thrift.skip(kind, 0)?,
        }
    }
    Ok(())
}

/// Checks the list of a schema's elements, in which groups precede their children.
fn schema<R: Read>(thrift: &mut Thrift<R>) -> Result<()> {
    let (kind, count) = thrift.list()?;
    let mut open: Vec<i64> = Vec::new(); // number of children still to come, for each enclosing group
    for _ in 0..count {
        let (mut last, mut children) = (0, 0);
        while let Some((field, kind)) = thrift.field(&mut last)? {
            match (field, kind) {
                (5, I32) => children = thrift.integer()?,
                (_, kind) => thrift.skip(kind, 1)?,
            }
        }
        if kind != STRUCT || children < 0 || children as u64 > count {
            return Err(error(format!("a schema of {count} elements, one of them with {children} children")));
        }
        while open.last() == Some(&0) {
            open.pop();
        }
        open.iter_mut().next_back().into_iter().for_each(|left| *left -= 1);
        open.push(children);
        if open.len() > MAX_DEPTH {
            return Err(error(format!("columns nested deeper than {MAX_DEPTH}")));
        }
    }
    Ok(())
}

/// A row group whose pages are checked before they are decoded.
pub(crate) struct Bounded<'a> {
    pub(crate) group: Box<dyn RowGroupReader + 'a>,
    pub(crate) file: &'a File,
    pub(crate) budget: Arc<Budget>,
}

impl RowGroupReader for Bounded<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.group.metadata()
    }

    fn num_columns(&self) -> usize {
        self.group.num_columns()
    }

    fn get_column_page_reader(&self, i: usize) -> Result<Box<dyn PageReader>> {
        let column = self.metadata().column(i);
        check_pages(self.file, column, &self.budget)?;
        let pages = self.group.get_column_page_reader(i)?;
        Ok(Box::new(BoundedPages { pages, column: column.column_descr_ptr(), budget: self.budget.clone() }))
    }

    fn get_column_bloom_filter(&self, i: usize) -> Option<&Sbbf> {
        self.group.get_column_bloom_filter(i)
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>> {
        RowIter::from_row_group(projection, self)
    }
}

/// Checks the sizes that are declared in the headers of a column's pages. The layout is described in
/// <https://parquet.apache.org/docs/file-format/data-pages/>.
fn check_pages(file: &File, column: &ColumnChunkMetaData, budget: &Budget) -> Result<()> {
    let (start, mut left) = column.byte_range();
    let mut file = file;
    file.seek(SeekFrom::Start(start))?;
    let mut reader = BufReader::new(file);
    while left > 0 {
        let header = Header::read(&mut reader, left)?;
        left -= header.length;
        if header.compressed > left {
            return Err(error("a page is longer than its column".to_owned()));
        }
        left -= header.compressed;
        if header.is_dictionary && header.uncompressed > MAX_DICTIONARY {
            let bytes = header.uncompressed;
            return Err(error(format!("a dictionary of {bytes} bytes; at most {MAX_DICTIONARY} are read")));
        }
        budget.pages(header.uncompressed)?;
        let mut data = reader.by_ref().take(header.compressed);
        if header.is_compressed {
            data.read_exact(&mut vec![0; header.levels.min(header.compressed) as usize])?;
            let most = header.uncompressed.saturating_sub(header.levels);
            if let Some(unpacked) = unbounded(column.compression(), &mut data)?
                && io::copy(&mut unpacked.take(most + 1), &mut io::sink()).unwrap_or(0) > most
            {
                return Err(error("a page unpacks to more bytes than its header declares".to_owned()));
            }
        }
        io::copy(&mut data, &mut io::sink())?;
    }
    Ok(())
}

/// Returns a decoder of a page for those codecs whose decoders in the crate `parquet` decompress more than the header
/// declares.
fn unbounded<'d>(codec: Compression, data: &'d mut dyn Read) -> Result<Option<Box<dyn Read + 'd>>> {
    /// First byte of a stream in Brotli's extension "large window", whose decoder allocates up to 1 GiB. It is not part
    /// of the format: <https://www.rfc-editor.org/rfc/rfc7932#section-9.1>.
    const LARGE_WINDOW: u8 = 0x11;
    let mut data = BufReader::new(data);
    Ok(match codec {
        Compression::GZIP(_) => Some(Box::new(MultiGzDecoder::new(data))),
        Compression::BROTLI(_) if data.fill_buf()?.first() == Some(&LARGE_WINDOW) => {
            return Err(error("a page in Brotli's extension with large windows".to_owned()));
        }
        Compression::BROTLI(_) => Some(Box::new(brotli::Decompressor::new(data, 4096))),
        // Before Parquet specified LZ4_RAW, some writers stored frames of LZ4 under this codec.
        Compression::LZ4 => Some(Box::new(FrameDecoder::new(data))),
        _ => None,
    })
}

/// The parts of a page's header that are checked.
struct Header {
    /// Size of the header in bytes.
    length: u64,
    is_dictionary: bool,
    uncompressed: u64,
    compressed: u64,
    /// Size in bytes of the uncompressed levels that precede a compressed data page of version 2.
    levels: u64,
    is_compressed: bool,
}

impl Header {
    fn read(reader: &mut impl Read, most: u64) -> Result<Header> {
        let mut thrift = Thrift { reader: reader.take(most) };
        let mut header =
            Header { length: 0, is_dictionary: false, uncompressed: 0, compressed: 0, levels: 0, is_compressed: true };
        let mut last = 0;
        while let Some((field, kind)) = thrift.field(&mut last)? {
            match (field, kind) {
                (1, I32) => header.is_dictionary = thrift.integer()? == 2,
                (2, I32) => header.uncompressed = thrift.size()?,
                (3, I32) => header.compressed = thrift.size()?,
                (8, STRUCT) => header.version_2(&mut thrift)?,
                (_, kind) => thrift.skip(kind, 0)?,
            }
        }
        header.length = most - thrift.reader.limit();
        Ok(header)
    }

    fn version_2<R: Read>(&mut self, thrift: &mut Thrift<R>) -> Result<()> {
        let mut last = 0;
        while let Some((field, kind)) = thrift.field(&mut last)? {
            match (field, kind) {
                (5 | 6, I32) => self.levels += thrift.size()?,
                (7, TRUE | FALSE) => self.is_compressed = kind == TRUE,
                (_, kind) => thrift.skip(kind, 1)?,
            }
        }
        Ok(())
    }
}

const TRUE: u8 = 1;
const FALSE: u8 = 2;
const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;
/// Maximum depth of nested groups in a schema, and of nested structs in a footer.
const MAX_DEPTH: usize = 32;

/// Reader of Thrift's compact protocol, as far as it is used in footers and page headers:
/// <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>.
struct Thrift<R> {
    reader: io::Take<R>,
}

impl<R: Read> Thrift<R> {
    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.reader.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(error("a number of more than 64 bits".to_owned()))
    }

    fn integer(&mut self) -> Result<i64> {
        let zigzag = self.varint()?;
        Ok((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64))
    }

    fn size(&mut self) -> Result<u64> {
        let size = self.integer()?;
        let in_range = u64::try_from(size).ok().filter(|size| *size <= i32::MAX as u64);
        in_range.ok_or_else(|| error(format!("a page of {size} bytes")))
    }

    /// Reads the next field id and its type; `None` at the end of a struct. Fields must be in the order of their ids,
    /// as all writers write them, so that none is read twice.
    fn field(&mut self, last: &mut i64) -> Result<Option<(i64, u8)>> {
        let byte = self.byte()?;
        if byte == 0 {
            return Ok(None);
        }
        let step = i64::from(byte >> 4);
        let field = if step > 0 { *last + step } else { self.integer()? };
        if field <= *last {
            return Err(error("fields of a footer or a page's header are out of order".to_owned()));
        }
        *last = field;
        Ok(Some((field, byte & 0xf)))
    }

    /// Reads the item type and the length of a list; each item takes at least one byte.
    fn list(&mut self) -> Result<(u8, u64)> {
        let byte = self.byte()?;
        let items = if byte >> 4 == 15 { self.varint()? } else { u64::from(byte >> 4) };
        if items > self.reader.limit() {
            return Err(error(format!("a list of {items} items in {} bytes", self.reader.limit())));
        }
        Ok((byte & 0xf, items))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Result<()> {
        match kind {
            TRUE | FALSE => {}
            3 => drop(self.byte()?),
            4..=6 => drop(self.varint()?),
            7 => (0..8).try_for_each(|_| self.byte().map(drop))?,
            8 => {
                let length = self.varint()?;
                let read = io::copy(&mut self.reader.by_ref().take(length), &mut io::sink())?;
                if read < length {
                    return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
                }
            }
            LIST if depth < MAX_DEPTH => {
                let (kind, items) = self.list()?;
                (0..items).try_for_each(|_| match kind {
                    TRUE | FALSE => self.byte().map(drop),
                    kind => self.skip(kind, depth + 1),
                })?;
            }
            STRUCT if depth < MAX_DEPTH => {
                let mut last = 0;
                while let Some((_, kind)) = self.field(&mut last)? {
                    self.skip(kind, depth + 1)?;
                }
            }
            kind => return Err(error(format!("type {kind} in a footer or a page's header"))),
        }
        Ok(())
    }
}

/// Pages whose number of values is checked before they are decoded.
struct BoundedPages {
    pages: Box<dyn PageReader>,
    column: ColumnDescPtr,
    budget: Arc<Budget>,
}

impl BoundedPages {
    fn check(&self, page: &Page) -> Result<()> {
        if let Page::DictionaryPage { buf, num_values, .. } = page {
            let least = match self.column.physical_type() {
                Physical::FIXED_LEN_BYTE_ARRAY => self.column.type_length().max(1) as u64,
                Physical::INT64 | Physical::DOUBLE => 8,
                _ => 4, // a number, or the length of a text
            };
            let fits = u64::from(*num_values) * least <= buf.len() as u64;
            let message = || format!("a dictionary of {num_values} values in {} bytes", buf.len());
            return if fits { Ok(()) } else { Err(error(message())) };
        }
        self.budget.values(u64::from(page.num_values()))?;
        let delta = matches!(page.encoding(), Encoding::DELTA_LENGTH_BYTE_ARRAY | Encoding::DELTA_BYTE_ARRAY);
        if delta && self.column.physical_type() != Physical::BOOLEAN {
            check_lengths(page, self.values_of(page)?)?;
        }
        Ok(())
    }

    /// Returns the bytes of a data page that follow its levels.
    fn values_of<'p>(&self, page: &'p Page) -> Result<&'p [u8]> {
        let cut = || error("a page ends within its levels".to_owned());
        let (mut skipped, bytes) = match page {
            Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, .. } => {
                (*def_levels_byte_len as usize + *rep_levels_byte_len as usize, buf.as_ref())
            }
            _ => (0, page.buffer().as_ref()),
        };
        if let Page::DataPage { buf, rep_level_encoding, def_level_encoding, .. } = page {
            let levels =
                [(self.column.max_rep_level(), rep_level_encoding), (self.column.max_def_level(), def_level_encoding)];
            for (_, encoding) in levels.into_iter().filter(|(most, _)| *most > 0) {
                if *encoding != Encoding::RLE {
                    return Err(error(format!("levels in the encoding {encoding}")));
                }
                let length = buf.get(skipped..).and_then(|rest| rest.first_chunk()).ok_or_else(cut)?;
                skipped = skipped.saturating_add(4).saturating_add(u32::from_le_bytes(*length) as usize);
            }
        }
        bytes.get(skipped..).ok_or_else(cut)
    }
}

/// Checks how many text lengths the delta encodings declare, since the decoder allocates memory for them.
fn check_lengths(page: &Page, values: &[u8]) -> Result<()> {
    let most = u64::from(page.num_values());
    let mut thrift = Thrift { reader: values.take(values.len() as u64) };
    let lists = if page.encoding() == Encoding::DELTA_BYTE_ARRAY { 2 } else { 1 };
    for _ in 0..lists {
        let count = skip_delta(&mut thrift, most)?;
        if count > most {
            return Err(error(format!("{count} lengths of texts in a page of {most} values")));
        }
    }
    Ok(())
}

/// Skips integers in the encoding DELTA_BINARY_PACKED, and returns their number if it is at most `most`:
/// <https://parquet.apache.org/docs/file-format/data-pages/encodings/>.
fn skip_delta<R: Read>(bytes: &mut Thrift<R>, most: u64) -> Result<u64> {
    let (block, miniblocks, count) = (bytes.varint()?, bytes.varint()?, bytes.varint()?);
    bytes.integer()?;
    if count > most || miniblocks == 0 || miniblocks > block || block > 1 << 20 {
        return Ok(if count > most { count } else { u64::MAX });
    }
    let mut left = count.saturating_sub(1);
    while left > 0 {
        bytes.integer()?;
        let widths: Vec<u8> = (0..miniblocks).map(|_| bytes.byte()).collect::<Result<_>>()?;
        for width in widths {
            if left > 0 {
                let packed = block / miniblocks * u64::from(width) / 8;
                (0..packed).try_for_each(|_| bytes.byte().map(drop))?;
                left = left.saturating_sub(block / miniblocks);
            }
        }
    }
    Ok(count)
}

impl Iterator for BoundedPages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Result<Page>> {
        self.get_next_page().transpose()
    }
}

impl PageReader for BoundedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        page.iter().try_for_each(|page| self.check(page))?;
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }
}
