//! Rows distributed to processes, compared with accelerate's own classes. `fixtures/make_shards.py` generated the
//! expected values.

use cl_data::{RowRef, shard};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    rows: usize,
    micro_batch_size: usize,
    world: usize,
    ranks: Vec<Vec<usize>>,
}

#[test]
fn rows_are_dealt_as_accelerate_deals_them() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/shards.json")).unwrap();
    assert_eq!(fixture.cases.len(), 160);
    for case in fixture.cases {
        let rows: Vec<RowRef> = (0..case.rows).map(|row| RowRef { dataset: 0, row }).collect();
        for (rank, expected) in case.ranks.iter().enumerate() {
            let dealt = shard(&rows, rank, case.world, case.micro_batch_size);
            let dealt: Vec<usize> = dealt.iter().map(|r| r.row).collect();
            let (n, b, w) = (case.rows, case.micro_batch_size, case.world);
            assert_eq!(dealt, *expected, "{n} rows, micro-batches of {b}, process {rank} of {w}");
        }
    }
}
