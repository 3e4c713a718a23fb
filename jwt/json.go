package jwt

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"unicode/utf8"
)

const (
	maxDepth = 32 // of nested objects and arrays
	maxList  = 16 // strings in an array that we read
)

// object holds the members of a JSON object under their exact names.
// Decoding into a struct would match names without regard to case.
type object map[string]json.RawMessage

// parseObject reads one JSON object and nothing after it (RFC 8259), and
// refuses what encoding/json lets pass although two parsers could read it in
// two ways: names that stand twice in an object, at any depth and however they
// are escaped (RFC 7515 section 4, RFC 7519 section 4), and text that is not
// Unicode. Its time is linear in the size of data, which callers bound.
func parseObject(data []byte) (object, error) {
	var o object
	if err := json.Unmarshal(data, &o); err != nil || o == nil { // null leaves o nil
		return nil, errors.New("not one JSON object")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber() // numbers stay text: 1e999 is somebody's claim, not our error
	if err := checkValue(dec, maxDepth); err != nil {
		return nil, err
	}
	return o, nil
}

// checkValue reads the next value of what is known to be valid JSON.
func checkValue(dec *json.Decoder, depth int) error {
	token, err := dec.Token()
	if err != nil { // unreachable: the JSON is valid
		return err
	}
	open, nested := token.(json.Delim)
	if !nested {
		return checkText(token)
	}
	if depth == 0 {
		return errors.New("nested too deep")
	}
	names := map[json.Token]bool{}
	for dec.More() {
		if open == '{' {
			name, err := dec.Token()
			if err != nil { // unreachable: the JSON is valid
				return err
			}
			if names[name] {
				return errors.New("duplicate member")
			}
			names[name] = true
			if err := checkText(name); err != nil {
				return err
			}
		}
		if err := checkValue(dec, depth-1); err != nil {
			return err
		}
	}
	_, err = dec.Token() // the closing bracket
	return err
}

// checkText refuses strings with U+FFFD, even where it is spelled out: it is
// what the decoder makes of invalid UTF-8 and of escapes of half a surrogate
// pair (RFC 8259 section 8), so that different texts would become equal.
func checkText(token json.Token) error {
	if s, isString := token.(string); isString && !isText(s) {
		return errors.New("a text is not valid Unicode")
	}
	return nil
}

func isText(s string) bool { return !strings.ContainsRune(s, utf8.RuneError) }

// text returns a string value; ok is false for an absent member and for any
// other type, null included.
func text(raw json.RawMessage) (s string, ok bool) {
	if len(raw) == 0 || raw[0] != '"' {
		return "", false
	}
	return s, json.Unmarshal(raw, &s) == nil
}

// textList returns the members of an array of strings.
func textList(raw json.RawMessage) (list []string, ok bool) {
	var items []json.RawMessage
	if json.Unmarshal(raw, &items) != nil || items == nil || len(items) > maxList { // null leaves items nil
		return nil, false
	}
	for _, item := range items {
		s, ok := text(item)
		if !ok {
			return nil, false
		}
		list = append(list, s)
	}
	return list, true
}
