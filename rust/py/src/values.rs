//! Settings from Python dictionaries, through serde: unknown keys and wrong types are refused with their path.

use orchestra_core::config::ConfigIssue;
use pyo3::{
    prelude::*,
    types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple},
};
use serde::{
    Deserializer, Serialize,
    de::{
        DeserializeOwned, Error as _, IntoDeserializer, Visitor,
        value::{Error, MapDeserializer, SeqDeserializer},
    },
    forward_to_deserialize_any,
};

use crate::errors::Failure;

/// Deepest nesting of settings that is read.
const DEPTH_MAX: u32 = 8;

/// Reads settings from a dictionary.
pub(crate) fn config_from<T: DeserializeOwned>(dict: &Bound<'_, PyDict>) -> PyResult<T> {
    let value = Value::read(dict.as_any(), DEPTH_MAX)?;
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let issue = ConfigIssue::new(path, error.into_inner().to_string());
        Failure::config(&[issue]).into()
    })
}

/// A flat struct of numbers, flags and names as a dictionary.
pub(crate) fn to_dict<'py, T: Serialize>(
    py: Python<'py>,
    figures: &T,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(figures) else {
        return Ok(dict);
    };
    for (name, value) in fields {
        match value {
            serde_json::Value::Bool(flag) => dict.set_item(name, flag)?,
            serde_json::Value::String(text) => dict.set_item(name, text)?,
            serde_json::Value::Number(number) => match number.as_u64() {
                Some(count) => dict.set_item(name, count)?,
                None => dict.set_item(name, number.as_f64())?,
            },
            _ => {}
        }
    }
    Ok(dict)
}

/// A Python value that a setting can have.
enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Self>),
    Map(Vec<(String, Self)>),
    /// No setting has this type; serde names the setting when it is reached.
    Other(String),
}

impl Value {
    fn read(object: &Bound<'_, PyAny>, depth_left: u32) -> PyResult<Self> {
        // `bool` is an `int` to Python, so it comes first.
        if object.is_none() {
            Ok(Self::None)
        } else if let Ok(value) = object.cast::<PyBool>() {
            Ok(Self::Bool(value.is_true()))
        } else if let Ok(value) = object.cast::<PyInt>() {
            let out_of_range = |_| Self::Other("an integer beyond 64 bits".to_owned());
            Ok(value.extract().map_or_else(out_of_range, Self::Int))
        } else if let Ok(value) = object.cast::<PyFloat>() {
            Ok(Self::Float(value.value()))
        } else if let Ok(value) = object.cast::<PyString>() {
            Ok(Self::Text(value.to_cow()?.into_owned()))
        } else if let Ok(value) = object.cast::<PyBytes>() {
            Ok(Self::Bytes(value.as_bytes().to_vec()))
        } else if depth_left == 0 {
            Ok(Self::Other("settings nested too deeply".to_owned()))
        } else if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
            let items = object.try_iter()?;
            let read = items.map(|item| Self::read(&item?, depth_left - 1));
            Ok(Self::List(read.collect::<PyResult<_>>()?))
        } else if let Ok(dict) = object.cast::<PyDict>() {
            let entries = dict.iter();
            let read = entries
                .map(|(key, value)| Ok((key.extract()?, Self::read(&value, depth_left - 1)?)));
            Ok(Self::Map(read.collect::<PyResult<_>>()?))
        } else {
            let class = object.get_type();
            Ok(Self::Other(format!("a value of type {}", class.name()?)))
        }
    }
}

impl<'de> Deserializer<'de> for Value {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Self::None => visitor.visit_unit(),
            Self::Bool(value) => visitor.visit_bool(value),
            Self::Int(value) => visitor.visit_i64(value),
            Self::Float(value) => visitor.visit_f64(value),
            Self::Text(value) => visitor.visit_string(value),
            Self::Bytes(value) => visitor.visit_byte_buf(value),
            Self::List(items) => visitor.visit_seq(SeqDeserializer::new(items.into_iter())),
            Self::Map(entries) => visitor.visit_map(MapDeserializer::new(entries.into_iter())),
            Self::Other(what) => Err(Error::custom(format!("unexpected: {what}"))),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Self::None => visitor.visit_none(),
            value => visitor.visit_some(value),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self {
            Self::Text(value) => value
                .into_deserializer()
                .deserialize_enum(name, variants, visitor),
            value => value.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, Error> for Value {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}
