package auth

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"os"
	"slices"
	"strings"
	"unicode/utf8"
)

// maxBody bounds a request body in bytes. What is beyond smallBody, more than
// any endpoint can use, is read only while the request has one of the places of
// largeBodies: thousands that come slowly hold little memory.
const (
	maxBody   = 64 << 10
	smallBody = 8 << 10
)

var largeBodies = make(chan struct{}, 64)

// member is one member that a request may have. The types of requests list
// theirs; there is no reflection and so no surprise about what is read. One of
// text, flag and object is set.
type member struct {
	name     string
	text     *string
	flag     *bool
	object   *json.RawMessage
	optional bool // may be absent or null
	path     bool // stands in the path, not in the body
}

// request is what the endpoints' input types implement through a pointer.
type request[T any] interface {
	*T
	members() []member
}

// readBody enforces the type and the bounds of a body before any parsing.
func readBody(w http.ResponseWriter, r *http.Request, want string) ([]byte, error) {
	media, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	charset, given := params["charset"]
	if err != nil || media != want || given && !strings.EqualFold(charset, "utf-8") || r.Header.Get("Content-Encoding") != "" {
		return nil, errUnsupportedMedia
	}
	if r.ContentLength > maxBody {
		return nil, errBodyTooLarge
	}
	limited := http.MaxBytesReader(w, r.Body, maxBody)
	body, err := io.ReadAll(io.LimitReader(limited, smallBody))
	if len(body) == smallBody {
		select {
		case largeBodies <- struct{}{}:
			defer func() { <-largeBodies }()
		case <-r.Context().Done():
			return nil, errBodyTimeout
		}
		var rest []byte
		rest, err = io.ReadAll(limited)
		body = append(body, rest...)
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, errBodyTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, errBodyTimeout
	case err != nil: // cut off, or broken chunks
		return nil, invalidFields(fieldError{"body", "incomplete"})
	}
	return body, nil
}

// decodeObject reads one JSON object (RFC 8259) into members, strictly: exact
// names, each at most once, strings only, and no text that a lenient parser
// could read in two ways. Two different byte strings never decode to the same
// password by replacement of what is not Unicode. It reports every wrong
// member at once, or "body" when the whole is no JSON object.
func decodeObject(body []byte, members []member) error {
	if !json.Valid(body) { // also bounds the nesting depth
		return invalidFields(fieldError{"body", "not_json"})
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return invalidFields(fieldError{"body", "not_an_object"})
	}
	var wrong []fieldError
	seen := map[string]bool{}
	for dec.More() {
		token, err := dec.Token()
		name, isString := token.(string)
		var raw json.RawMessage
		if err != nil || !isString || dec.Decode(&raw) != nil { // unreachable: the body is valid JSON
			return invalidFields(fieldError{"body", "not_json"})
		}
		i := slices.IndexFunc(members, func(m member) bool { return m.name == name && !m.path })
		switch {
		case seen[name]:
			wrong = append(wrong, fieldError{clientText(name, 64), "duplicate"})
		case i < 0:
			wrong = append(wrong, fieldError{clientText(name, 64), "unknown"})
		default:
			if reason := members[i].decode(raw); reason != "" {
				wrong = append(wrong, fieldError{name, reason})
			}
		}
		seen[name] = true
		if len(wrong) > 20 { // enough to say so; the body may hold thousands
			return invalidFields(wrong...)
		}
	}
	for _, m := range members {
		if !seen[m.name] && !m.optional && !m.path {
			wrong = append(wrong, fieldError{m.name, "missing"})
		}
	}
	if len(wrong) > 0 {
		return invalidFields(wrong...)
	}
	return nil
}

// decode returns what is wrong with the value, or "".
func (m *member) decode(raw json.RawMessage) string {
	switch {
	case string(raw) == "null" && m.optional:
		return ""
	case string(raw) == "null":
		return "null"
	case m.flag != nil && (raw[0] == 't' || raw[0] == 'f'):
		*m.flag = raw[0] == 't'
		return ""
	case m.object != nil && raw[0] == '{': // who takes an object checks what is in it
		*m.object = raw
		return ""
	case m.text == nil || raw[0] != '"':
		return "wrong_type"
	case !utf8.Valid(raw) || hasLoneSurrogate(raw):
		return "invalid_unicode" // encoding/json would put U+FFFD in its place
	case json.Unmarshal(raw, m.text) != nil: // unreachable: a valid JSON string
		return "wrong_type"
	case m.optional && *m.text == "":
		return "empty" // leave it away instead
	}
	return ""
}

// hasLoneSurrogate finds a \u escape of half a surrogate pair in a valid JSON
// string token.
func hasLoneSurrogate(raw []byte) bool {
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			continue
		}
		i++ // the escaped character; valid JSON has one
		if raw[i] != 'u' {
			continue
		}
		unit := hex16(raw[i+1 : i+5])
		i += 4
		if unit < 0xD800 || unit > 0xDFFF {
			continue
		}
		if unit > 0xDBFF || i+6 >= len(raw) || raw[i+1] != '\\' || raw[i+2] != 'u' {
			return true
		}
		if low := hex16(raw[i+3 : i+7]); low < 0xDC00 || low > 0xDFFF {
			return true
		}
		i += 6
	}
	return false
}

// hex16 reads the four hex digits that JSON validity guarantees.
func hex16(digits []byte) (n uint16) {
	for _, c := range digits {
		switch {
		case c <= '9':
			c -= '0'
		default:
			c = c | 0x20 - 'a' + 10
		}
		n = n<<4 | uint16(c)
	}
	return n
}
