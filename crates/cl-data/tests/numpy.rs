//! Sampling compared with NumPy's legacy generator, bit for bit; `fixtures/make_numpy.py` generated the expected
//! values.

use cl_data::numpy::random_state;
use cl_data::{Draw, Profile, epoch_rows};
use serde_json::Value;

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/numpy.json")).unwrap()
}

fn checksum(values: impl Iterator<Item = u64>) -> String {
    values.fold(14_695_981_039_346_656_037_u64, |h, v| (h ^ v).wrapping_mul(1_099_511_628_211)).to_string()
}

fn list(value: &Value) -> Vec<usize> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn permutations() {
    let fixture = fixture();
    let cases = fixture["permutations"].as_array().unwrap();
    assert_eq!(cases.len(), 36);
    for case in cases {
        let (seed, n) = (case["seed"].as_u64().unwrap(), case["n"].as_u64().unwrap() as usize);
        let ours = random_state(seed).permutation(n);
        assert_eq!(ours[..n.min(8)], list(&case["head"]), "seed {seed}, n {n}");
        assert_eq!(checksum(ours.iter().map(|&i| i as u64)), case["checksum"], "seed {seed}, n {n}");
    }
}

#[test]
fn mixtures_of_the_paper() {
    for case in fixture()["mixtures"].as_array().unwrap() {
        let (sizes, lengths) = (list(&case["sizes"]), list(&case["lengths"]));
        let draws = sizes.iter().zip(&lengths).map(|(&rows, &take)| Draw { rows, take, fixed: None });
        let draws: Vec<Draw> = draws.collect();
        let rows = epoch_rows(&draws, case["epoch"].as_u64().unwrap(), 99, Profile::Paper);
        let head: Vec<Vec<usize>> = rows[..6].iter().map(|r| vec![r.dataset, r.row]).collect();
        assert_eq!(serde_json::to_value(head).unwrap(), case["head"]);
        assert_eq!(checksum(rows.iter().map(|r| (r.dataset * 1_000_003 + r.row) as u64)), case["checksum"]);
    }
}
