package store

import "strings"

// EncodeTag makes an image's name fit for one component of a ref's name, as
// composefs-rs does (encode_tag in crates/composefs-oci/src/oci_image.rs): "%"
// becomes "%25" and "/" becomes "%2F", all else stays.
func EncodeTag(name string) string {
	return strings.NewReplacer("%", "%25", "/", "%2F").Replace(name)
}

// DecodeTag is the inverse of EncodeTag. Any other text after a "%" stays as it is.
func DecodeTag(encoded string) string {
	return strings.NewReplacer("%25", "%", "%2F", "/").Replace(encoded)
}
