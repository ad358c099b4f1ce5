//! JSON objects as pairs in file order. Duplicate keys are an error; serde alone would keep the last one.
//!
//! For `#[serde(with = "ordered_map")]`; null counts as an empty object.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};

pub(crate) fn serialize<S: Serializer, K: Serialize, V: Serialize>(
    pairs: &[(K, V)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(key, value)| (key, value)))
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>, K: From<String>, V: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<(K, V)>, D::Error> {
    let pairs = Option::<Pairs<V>>::deserialize(deserializer)?.map_or_else(Vec::new, |pairs| pairs.0);
    Ok(pairs.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

struct Pairs<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PairsVisitor(PhantomData))
    }
}

struct PairsVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<V> {
    type Value = Pairs<V>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<V>, A::Error> {
        let mut seen = std::collections::HashSet::new();
        let mut pairs = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value().map_err(|e| A::Error::custom(format_args!("`{key}`: {e}")))?;
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format_args!("`{key}` appears twice")));
            }
            pairs.push((key, value));
        }
        Ok(Pairs(pairs))
    }
}
