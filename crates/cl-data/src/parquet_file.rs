//! Reads rows of a Parquet file, as the same values that the data set has in JSON.
//!
//! Nested columns are assembled to records as in Dremel, as described in the format's documentation
//! (<https://parquet.apache.org/docs/file-format/nestedencoding/>); the crate `parquet` implements this.

use std::collections::HashSet;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as Physical};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::{Number, Value};

use crate::Error;
use crate::parquet_limits::{Bounded, Budget, check_schema};
use crate::problem::ParquetProblem;
use crate::row::{Row, TakeRow, UsedColumns};

/// Magic number at the start and end of a Parquet file.
pub(crate) const MAGIC: &[u8] = b"PAR1";

/// Passes each row of a file to `take`, without the columns that cannot be read; `path` is for error messages.
///
/// Returns an error if the file is damaged or exceeds the limits of [`Budget`], or if a column that is `used`, or every
/// column, has a type that JSON lacks or a compression that is not supported.
pub(crate) fn each_row(path: &Path, file: File, used: UsedColumns<'_>, take: TakeRow<'_>) -> Result<(), Error> {
    let form = |problem: ParquetProblem| Error::Form { path: path.to_owned(), problem: problem.into() };
    // The crate's decoders panic on some damaged pages; `decoded` converts this to an error.
    let (reader, budget) = decoded(|| open(&file)).map_err(form)?;
    let projection = decoded(|| projection(&reader, used)).map_err(form)?;
    let groups = reader.metadata().row_groups();
    let mut found = 0;
    for group in 0..groups.len() {
        let bounded = || Ok(Bounded { group: reader.get_row_group(group)?, file: &file, budget: budget.clone() });
        let bounded = decoded(|| bounded().map_err(damaged)).map_err(form)?;
        let rows = || RowIter::from_row_group(projection.clone(), &bounded).map_err(damaged);
        let mut rows = decoded(rows).map_err(form)?;
        while let Some(row) = decoded(|| next(&mut rows, &budget).map_err(damaged)).map_err(form)? {
            take(found, row)?;
            found += 1;
        }
    }
    let declared = groups.iter().map(|g| g.num_rows()).sum::<i64>();
    if found as i64 != declared {
        return Err(form(ParquetProblem::RowCount { found, declared }));
    }
    Ok(())
}

fn damaged(source: ParquetError) -> ParquetProblem {
    ParquetProblem::Damaged { source }
}

fn decoded<T>(decode: impl FnOnce() -> Result<T, ParquetProblem>) -> Result<T, ParquetProblem> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or(Err(ParquetProblem::Pages))
}

fn open(file: &File) -> Result<(SerializedFileReader<File>, Arc<Budget>), ParquetProblem> {
    let io = |e| damaged(ParquetError::from(e));
    let budget = Budget::new(file.metadata().map_err(io)?.len());
    check_schema(file).map_err(damaged)?;
    let reader = SerializedFileReader::new(file.try_clone().map_err(io)?).map_err(damaged)?;
    Ok((reader, Arc::new(budget)))
}

/// Returns the schema of the columns that can be read; `None` for all.
fn projection(reader: &SerializedFileReader<File>, used: UsedColumns<'_>) -> Result<Option<Type>, ParquetProblem> {
    let schema = reader.metadata().file_metadata().schema();
    let columns = schema.get_fields();
    let used = used(&columns.iter().map(|column| column.name()).collect::<Vec<_>>());
    let chunks = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    let lzo = chunks.filter(|chunk| chunk.compression() == Compression::LZO);
    let lzo: HashSet<&str> = lzo.filter_map(|chunk| Some(chunk.column_path().parts().first()?.as_str())).collect();
    let codec = |name: &str| {
        let problem = || ParquetProblem::Codec { column: name.to_owned(), found: "LZO" };
        if lzo.contains(name) { Err(problem()) } else { Ok(()) }
    };
    let (mut readable, mut omitted) = (Vec::new(), None);
    for column in columns {
        let name = column.name();
        match supported(column, name).and_then(|()| codec(name)) {
            Ok(()) => readable.push(column.clone()),
            Err(problem) if used.iter().any(|used| used == name) => return Err(problem),
            Err(problem) => omitted = omitted.or(Some(problem)),
        }
    }
    match omitted {
        None => Ok(None),
        Some(problem) if readable.is_empty() => Err(problem),
        Some(_) => {
            let readable = Type::group_type_builder(schema.name()).with_fields(readable).build();
            readable.map(Some).map_err(damaged)
        }
    }
}

fn next(rows: &mut RowIter<'_>, budget: &Budget) -> Result<Option<Row>, ParquetError> {
    let Some(row) = rows.next().transpose()? else { return Ok(None) };
    let row = fields(row.into_columns());
    budget.values(1)?;
    budget.texts(row.iter().map(|(name, value)| name.len() as u64 + text_bytes(value)).sum())?;
    Ok(Some(row))
}

/// Returns the size in bytes of the texts in a value.
fn text_bytes(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| name.len() as u64 + text_bytes(value)).sum(),
        _ => 0,
    }
}

/// Checks that a column, given by its dotted path, can be represented in JSON.
fn supported(column: &Type, name: &str) -> Result<(), ParquetProblem> {
    let path = || name.to_owned();
    let info = column.get_basic_info();
    if column.is_primitive() {
        return match unsupported(column) {
            None => Ok(()),
            Some(found) => Err(ParquetProblem::Type { column: path(), found }),
        };
    }
    match info.converted_type() {
        ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE => Err(ParquetProblem::Map { column: path() }),
        ConvertedType::LIST => match column.get_fields() {
            [items] if items.get_basic_info().repetition() == Repetition::REPEATED => children(items, name),
            _ => Err(ParquetProblem::ListLayout { column: path() }),
        },
        _ => children(column, name),
    }
}

fn children(column: &Type, name: &str) -> Result<(), ParquetProblem> {
    if column.is_primitive() {
        return supported(column, name);
    }
    column.get_fields().iter().try_for_each(|child| supported(child, &format!("{name}.{}", child.name())))
}

/// Returns the type of a leaf that JSON cannot represent; `None` if it can.
fn unsupported(leaf: &Type) -> Option<String> {
    use ConvertedType as C;
    let info = leaf.get_basic_info();
    let fits = match (leaf.get_physical_type(), info.converted_type()) {
        (Physical::BOOLEAN | Physical::FLOAT | Physical::DOUBLE, _) => true,
        (Physical::INT32, C::NONE | C::INT_8 | C::INT_16 | C::INT_32 | C::UINT_8 | C::UINT_16 | C::UINT_32) => true,
        // Nanosecond timestamps only have a logical type, so they would be mistaken for integers.
        (Physical::INT64, C::NONE) => info.logical_type_ref().is_none(),
        (Physical::INT64, C::INT_64 | C::UINT_64) => true,
        (Physical::BYTE_ARRAY, C::UTF8 | C::ENUM | C::JSON) => true,
        (Physical::FIXED_LEN_BYTE_ARRAY, _) => info.logical_type_ref() == Some(&LogicalType::Float16),
        _ => false,
    };
    (!fits).then(|| match (info.logical_type_ref(), info.converted_type()) {
        (Some(logical), _) => format!("{logical:?}"),
        (None, C::NONE) => format!("{:?} (bytes without a meaning)", leaf.get_physical_type()),
        (None, converted) => format!("{converted:?}"),
    })
}

fn fields(columns: Vec<(String, Field)>) -> Row {
    columns.into_iter().map(|(name, field)| (name, json(&field))).collect()
}

/// Converts a value to JSON. Unsupported types have been rejected by [`supported`].
fn json(field: &Field) -> Value {
    match field {
        Field::Bool(b) => Value::Bool(*b),
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float16(n) => float(f64::from(n.to_f32())),
        Field::Float(n) => float(f64::from(*n)),
        Field::Double(n) => float(*n),
        Field::Str(text) => Value::String(text.clone()),
        Field::Group(row) => Value::Object(row.get_column_iter().map(|(k, v)| (k.clone(), json(v))).collect()),
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        _ => Value::Null,
    }
}

/// Converts a float. JSON has no NaN and no infinity; `to_json` of pandas and of `datasets` also writes null for them.
fn float(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}
