package auth

import (
	"bufio"
	"bytes"
	"errors"
	"hash/maphash"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/7d-solutions/identity-auth/db"
)

// maxPassword bounds a password in bytes: argon2 hashes its input with BLAKE2b
// first, so long ones would cost little, but nobody types more.
const maxPassword = 1024

// passwordPolicy follows NIST SP 800-63B-4 section 3.1.1.2: a least length and
// lists of what is guessed first; no composition rules, no normalisation.
type passwordPolicy struct {
	minLength int        // code points
	blocklist *Blocklist // nil: none
}

// check returns every reason to refuse the password, or nil.
func (p passwordPolicy) check(password string, email db.Email) (reasons []string) {
	if utf8.RuneCountInString(password) < p.minLength {
		reasons = append(reasons, "too_short")
	}
	if len(password) > maxPassword {
		return append(reasons, "too_long") // do not analyse megabytes
	}
	if isCommon(password) {
		reasons = append(reasons, "common")
	}
	if containsEmail(password, email.String()) {
		reasons = append(reasons, "contains_email")
	}
	if p.blocklist.contains(password) {
		reasons = append(reasons, "blocklisted")
	}
	return reasons
}

// containsEmail finds the address or, from 4 bytes on, its local part.
func containsEmail(password, email string) bool {
	lower := strings.ToLower(password)
	local, _, _ := strings.Cut(email, "@")
	return strings.Contains(lower, email) || len(local) >= 4 && strings.Contains(lower, local)
}

// isCommon finds what guessers try first among passwords this long: repeated
// or keyboard sequences, and one frequent word, also repeated, with digits,
// years or signs around it, in any case and with the usual letter swaps. Two
// different words are accepted: lists of such pairs belong into
// PASSWORD_BLOCKLIST_FILE.
func isCommon(password string) bool {
	lower := strings.ToLower(password)
	if isRepetition(lower) || isSequence(lower) || isSequence(collapsed(lower)) {
		return true
	}
	for _, form := range unswapped(lower) {
		// Swapped digits may also be plain ones around the word.
		bare := strings.TrimFunc(form, func(r rune) bool { return r < 'a' || r > 'z' })
		letters := strings.Map(func(r rune) rune {
			if 'a' <= r && r <= 'z' || r > 127 {
				return r
			}
			return -1
		}, form)
		if isFrequent(bare) || isFrequent(letters) {
			return true
		}
	}
	return false
}

// unswapped is the password read with no, one or the other usual set of letter
// swaps, each also with the digits and signs at its ends cut off first.
func unswapped(lower string) []string {
	core := strings.TrimFunc(lower, func(r rune) bool { return r < 128 && (r < 'a' || r > 'z') })
	tail := strings.TrimRightFunc(lower, func(r rune) bool { return '0' <= r && r <= '9' || strings.ContainsRune("!?.*#-_ ", r) })
	forms := []string{lower, core}
	for _, swap := range []*strings.Replacer{swapsL, swapsI, swapsSign} {
		forms = append(forms, swap.Replace(lower), swap.Replace(core), swap.Replace(tail))
	}
	return forms
}

var (
	swapsL = strings.NewReplacer("@", "a", "4", "a", "8", "b", "(", "c", "3", "e", "6", "g", "9", "g", "1", "l", "|", "l", "0", "o", "$", "s", "5", "s", "7", "t", "+", "t", "2", "z", "!", "i")
	swapsI = strings.NewReplacer("@", "a", "4", "a", "8", "b", "(", "c", "3", "e", "6", "g", "9", "g", "1", "i", "|", "i", "0", "o", "$", "s", "5", "s", "7", "t", "+", "t", "2", "z", "!", "i")
)

// swapsSign leaves ! a sign.
var swapsSign = strings.NewReplacer("@", "a", "4", "a", "3", "e", "1", "i", "0", "o", "$", "s", "5", "s", "7", "t")

// collapsed is s with neighbours that are alike made one: 112233 becomes 123.
func collapsed(s string) string {
	var b strings.Builder
	last := rune(-1)
	for _, r := range s {
		if r != last {
			b.WriteRune(r)
		}
		last = r
	}
	return b.String()
}

// isFrequent tells whether s is a frequent word, or one repeated.
func isFrequent(s string) bool {
	if s == "" {
		return false
	}
	for n := 1; n <= len(s); n++ {
		if len(s)%n == 0 && s == strings.Repeat(s[:n], len(s)/n) {
			_, found := slices.BinarySearch(frequentWords, s[:n])
			return found // n is the shortest period
		}
	}
	return false // unreachable: n == len(s) always matches
}

// isRepetition tells whether s consists of at most two different characters or
// of one block of up to a third of it, repeated, with a cut-off rest.
func isRepetition(s string) bool {
	runes := []rune(s)
	distinct := map[rune]bool{}
	for _, r := range runes {
		distinct[r] = true
	}
	if len(distinct) <= 2 {
		return true
	}
	for period := 1; period <= len(runes)/3; period++ {
		same := true
		for i := period; i < len(runes) && same; i++ {
			same = runes[i] == runes[i-period]
		}
		if same {
			return true
		}
	}
	return false
}

// isSequence tells whether s is made of at most four runs along the alphabet,
// the digits or the keyboard, forwards or backwards, each of 3 or more
// characters, with digits and signs between them that are not the most of it.
func isSequence(s string) bool {
	runs, covered, i := 0, 0, 0
	for i < len(s) {
		best := 0
		for _, line := range sequences {
			n := 0
			for i+n < len(s) && n < len(line) && strings.Contains(line, s[i:i+n+1]) {
				n++
			}
			best = max(best, n)
		}
		switch {
		case best >= 3:
			runs++
			covered += best
			i += best
		case s[i] < 'a' && s[i] < 128: // a digit or a sign
			i++
		default:
			return false
		}
	}
	return runs <= 4 && 2*covered >= len(s)
}

// sequences are both directions of what fingers and memory run along.
var sequences = func() []string {
	lines := []string{
		"abcdefghijklmnopqrstuvwxyz", "01234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm", "qwertzuiop", "yxcvbnm", "azertyuiop", "qsdfghjklm", "wxcvbn",
		"1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik9ol0p", "1q2w3e4r5t6y7u8i9o0p", "q1w2e3r4t5y6u7i8o9p0", "qazwsxedcrfvtgbyhnujmikolp", "!@#$%^&*()", "qweasdzxc", "a1b2c3d4e5f6g7h8i9",
		"1a2b3c4d5e6f7g8h9i", "147258369", "159357", "741852963", "321654987",
	}
	for _, line := range slices.Clone(lines) {
		back := []byte(line)
		slices.Reverse(back)
		lines = append(lines, string(back))
	}
	return lines
}()

// frequentWords, sorted: words that stand behind most of the passwords of any
// leak, names and places left to PASSWORD_BLOCKLIST_FILE but for the commonest.
var frequentWords = slices.Sorted(slices.Values(strings.Fields(`
aaron abc abcd access account adidas admin administrator airplane alex alexander alexandra alexis amanda america american andrea andrew angel angela
angels animal anthony apple april arsenal asdf asdfgh ashley august austin babygirl backup badboy banana barbara barcelona baseball basketball batman
beautiful benjamin bigdaddy birthday blessed blink bonjour booboo boomer brandon britney brooklyn brother bubbles buster butterfly california cameron
captain carlos celtic changeit changeme changepassword charlie cheese chelsea chester chicago chicken chocolate christian christmas christopher classic
coffee college compaq computer cookie corporate cowboys crystal daniel daniela database david december default demo desktop diamond dolphin dragon
eagles edward einstein elephant elizabeth eminem emmanuel enter everton facebook family february ferrari flower football forever formula freedom
friday friend friends fuckoff fuckyou gabriel games garfield genius george gibson ginger google gorgeous guitar hacker hannah happiness harley
heather heaven hello helloworld hockey holiday hunter hunter2 iloveu iloveyou iloveyouso internet jackson january jasmine jasper jennifer jessica jesus jesuschrist jonathan
jordan joseph joshua july june junior justin kevin killer kingdom kitty klaster lakers letmein letmeinnow letmeinplease linkedin liverpool login london lovely loveme
loveyou lover maggie magic manager manchester manunited march margaret marina martin master matrix matthew maverick mercedes metallica michael michelle
microsoft minecraft monday money monkey monster mother mustang myspace naruto natasha network newyork nicholas nicole nintendo november nothing october
office online operator orange pa pakistan panther passport pass passw passwd passwort password passwords password1 patrick peanut people pepper personal phoenix
pikachu playstation please pokemon porsche precious princess private public purple pussycat qazwsx qwerty qwertyuiop qwertz azerty rachel rainbow ranger rangers
rebecca robert rocky ronaldo root samantha samsung santiago sarah saturday scooter secret secure security september server service shadow shopping
silver simple slipknot smile snoopy snowball soccer softball spiderman spring starwars steelers stephanie strawberry student summer sunday sunflower sunshine
superman support sweetheart sweety system taylor teacher tech temp temporary test tester testing testtest thomas thursday tigger tinkerbell
trustme trustno trustnoone tuesday tweety twitter unknown user username vanessa victoria vincent wednesday welcome whatever william willow windows winner winter wizard
yankees yellow youtube zxcvbnm
adminadmin adminpassword administrador contrasena defaultpassword guest guestguest masterkey motdepasse mypassword newpassword oracle passwordpassword
passwordadmin userpassword rootroot rootpassword sysadmin superuser supersecret temppassword testpassword thisisapassword yourpassword
`)))

// Blocklist holds 64-bit keyed hashes of forbidden passwords: 8 bytes each,
// less than the file. A password is refused by mistake with a chance below one
// in a billion for 10 million entries.
type Blocklist struct {
	seed   maphash.Seed
	hashes []uint64 // sorted
}

// LoadBlocklist reads one password a line; empty lines count for nothing.
// Comparison is by lower case in ASCII.
func LoadBlocklist(path string) (*Blocklist, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, errors.New("file cannot be opened")
	}
	defer f.Close()
	lines := 1 // counted first: growing the slice would double the memory
	err = eachLine(f, func([]byte) { lines++ })
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, errors.New("file cannot be read twice")
	}
	b := &Blocklist{seed: maphash.MakeSeed(), hashes: make([]uint64, 0, lines)}
	err = eachLine(f, func(line []byte) {
		lowerASCII(line)
		b.hashes = append(b.hashes, maphash.Bytes(b.seed, line))
	})
	slices.Sort(b.hashes)
	return b, err
}

// eachLine calls f with every line that is not empty, without its end.
func eachLine(r io.Reader, f func([]byte)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 64<<10), 64<<10)
	for lines.Scan() {
		if line := bytes.TrimSuffix(lines.Bytes(), []byte("\r")); len(line) > 0 {
			f(line)
		}
	}
	if lines.Err() != nil {
		return errors.New("file cannot be read, or has a line longer than 64 KiB")
	}
	return nil
}

func lowerASCII(b []byte) {
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + ('a' - 'A')
		}
	}
}

// Bytes is the memory of the list.
func (b *Blocklist) Bytes() int64 {
	if b == nil {
		return 0
	}
	return int64(8 * cap(b.hashes))
}

func (b *Blocklist) contains(password string) bool {
	if b == nil {
		return false
	}
	p := []byte(password)
	lowerASCII(p)
	_, found := slices.BinarySearch(b.hashes, maphash.Bytes(b.seed, p))
	return found
}
