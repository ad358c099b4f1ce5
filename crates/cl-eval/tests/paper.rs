//! The paper's published numbers, put through our matrix and tables.

use std::io::Write;
use std::path::Path;

use cl_eval::paper::tables;
use cl_eval::{Column, Group, ScoreMatrix, table_of};

/// Returns Table 3 or 4 as a matrix, with the base of Table 6 as the first row.
fn new_knowledge(table: usize) -> ScoreMatrix {
    let tables = tables();
    let table = &tables[table - 1];
    let rounds = [1, 2, 3, 4, 5, 6, 7, 7]; // the math round trains for both gsm8k and gsm8k_cot
    let columns = table.columns.iter().zip(rounds).map(|(c, r)| Column::new(c, Group::New, Some(r))).collect();
    let mut matrix = ScoreMatrix::new(columns);
    let base = std::iter::once(&tables[5].rows[0]);
    for row in base.chain(&table.rows[..7]) {
        matrix.push(&row.row, row.values[..8].iter().copied().map(Some).collect()).unwrap();
    }
    matrix
}

#[test]
fn the_matrix_gives_the_printed_rows() {
    for number in [3, 4] {
        let matrix = new_knowledge(number);
        let printed = &tables()[number - 1];
        let bwt = printed.rows.iter().find(|r| r.row == "BWT").unwrap();
        for (c, value) in bwt.values.iter().enumerate() {
            let ours = matrix.relative_bwt(c).unwrap();
            // Printed in whole percent.
            assert!((ours - value).abs() <= 0.0051, "Table {number} {c}: {ours} {value}");
        }
        assert_eq!((matrix.relative_bwt(6), matrix.relative_bwt(7)), (None, None));
        let (percentages, ratio) = matrix.average_gains(Group::New);
        let expected = [(3, "175", "59.8"), (4, "192", "54.0")].into_iter().find(|e| e.0 == number).unwrap();
        assert_eq!(format!("{:.0}", 100.0 * percentages.unwrap()), expected.1);
        assert_eq!(format!("{:.1}", 100.0 * ratio.unwrap()), expected.2);
    }
}

#[test]
fn table_4_laid_out() {
    let table = table_of(&new_knowledge(4), Group::New, "Table 4 again (profile paper).").unwrap();
    let text = table.text();
    let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["cstan", "fomc", "meet", "py150", "sci", "20min", "gsm8k", "gsmcot", "AVE"]);
    assert_eq!(lines[1][..2], ["base", "0.2180"]);
    assert_eq!(
        lines[8],
        "LoRA 1-7 0.5080 0.5988 0.3480 0.5437 0.5310 0.3903 0.7096 0.7104 0.5425".split(' ').collect::<Vec<_>>()
    );
    assert_eq!(lines[9][..2], ["gain", "base"]);
    assert_eq!(lines[10], "BWT -5.0% -14.9% -7.7% 0.0% -40.8% -4.1% – – -12.1%".split(' ').collect::<Vec<_>>());
    assert!(text.contains("(profile paper)"));
}

/// The embedded cells equal those of the project's specification, if that is available.
#[test]
fn embedded_cells_are_the_specified_ones() {
    let shared =
        std::env::var_os("CL_SHARED").map_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), Into::into);
    let Ok(text) = std::fs::read_to_string(shared.join("spec/paper-tables.json")) else {
        // Not eprintln, which the test runner captures.
        let mut stderr = std::io::stderr();
        writeln!(stderr, "left out: 1 check against ../shared/spec/paper-tables.json, which is not there").unwrap();
        return;
    };
    let specified: serde_json::Value = serde_json::from_str(&text).unwrap();
    for table in tables() {
        let theirs = &specified[table.table.to_string()];
        assert_eq!(theirs["rows"].as_array().unwrap().len(), table.rows.len());
        for (row, their) in table.rows.iter().zip(theirs["rows"].as_array().unwrap()) {
            assert_eq!(row.row, their["row"].as_str().unwrap());
            let values: Vec<f64> = serde_json::from_value(their["values"].clone()).unwrap();
            assert_eq!(values.len(), row.values.len());
            for (a, b) in row.values.iter().zip(values) {
                assert!((a - b).abs() < 1e-12, "{}: {a} {b}", row.row); // percentages divided by 100 in floating point
            }
        }
    }
}
